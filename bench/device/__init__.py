"""lowbit on a real GPU: builds it, tests it, checks it with the platform's tool, and measures it beside its peers.

Run by bench/device_check.sh. What was done is in one JSON file, and a run that is given that file goes on where it stopped.
"""
