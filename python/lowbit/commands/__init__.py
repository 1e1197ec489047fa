"""One file per command: `add_parser(commands)` describes it, `run(args)` does it and returns the exit code."""
