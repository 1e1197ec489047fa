// The registers of D as wgmma's PTX lists them (ptx_wgmma.cuh), which no loop of the preprocessor could number.
//
//   LOWBIT_D_n      n / 2 of them, for n columns: %0 ..
//   LOWBIT_D0_n     the same of the first of two fragments, LOWBIT_D1_n of the second, that take turns every 8 columns:
//                   %0 .. %3, %8 .. %11, ..; %4 .. %7, %12 .. %15, ..
//   LOWBIT_O_n      as operands, in that order; LOWBIT_OO_n of two fragments
#pragma once

// clang-format off
#define LOWBIT_D_8 "%0, %1, %2, %3"
#define LOWBIT_D_16 LOWBIT_D_8 ", %4, %5, %6, %7"
#define LOWBIT_D_24 LOWBIT_D_16 ", %8, %9, %10, %11"
#define LOWBIT_D_32 LOWBIT_D_24 ", %12, %13, %14, %15"
#define LOWBIT_D_40 LOWBIT_D_32 ", %16, %17, %18, %19"
#define LOWBIT_D_48 LOWBIT_D_40 ", %20, %21, %22, %23"
#define LOWBIT_D_56 LOWBIT_D_48 ", %24, %25, %26, %27"
#define LOWBIT_D_64 LOWBIT_D_56 ", %28, %29, %30, %31"
#define LOWBIT_D_72 LOWBIT_D_64 ", %32, %33, %34, %35"
#define LOWBIT_D_80 LOWBIT_D_72 ", %36, %37, %38, %39"
#define LOWBIT_D_88 LOWBIT_D_80 ", %40, %41, %42, %43"
#define LOWBIT_D_96 LOWBIT_D_88 ", %44, %45, %46, %47"
#define LOWBIT_D_104 LOWBIT_D_96 ", %48, %49, %50, %51"
#define LOWBIT_D_112 LOWBIT_D_104 ", %52, %53, %54, %55"
#define LOWBIT_D_120 LOWBIT_D_112 ", %56, %57, %58, %59"
#define LOWBIT_D_128 LOWBIT_D_120 ", %60, %61, %62, %63"

#define LOWBIT_D0_8 "%0, %1, %2, %3"
#define LOWBIT_D0_16 LOWBIT_D0_8 ", %8, %9, %10, %11"
#define LOWBIT_D0_24 LOWBIT_D0_16 ", %16, %17, %18, %19"
#define LOWBIT_D0_32 LOWBIT_D0_24 ", %24, %25, %26, %27"
#define LOWBIT_D0_40 LOWBIT_D0_32 ", %32, %33, %34, %35"
#define LOWBIT_D0_48 LOWBIT_D0_40 ", %40, %41, %42, %43"
#define LOWBIT_D0_56 LOWBIT_D0_48 ", %48, %49, %50, %51"
#define LOWBIT_D0_64 LOWBIT_D0_56 ", %56, %57, %58, %59"
#define LOWBIT_D0_72 LOWBIT_D0_64 ", %64, %65, %66, %67"
#define LOWBIT_D0_80 LOWBIT_D0_72 ", %72, %73, %74, %75"
#define LOWBIT_D0_88 LOWBIT_D0_80 ", %80, %81, %82, %83"
#define LOWBIT_D0_96 LOWBIT_D0_88 ", %88, %89, %90, %91"
#define LOWBIT_D0_104 LOWBIT_D0_96 ", %96, %97, %98, %99"
#define LOWBIT_D0_112 LOWBIT_D0_104 ", %104, %105, %106, %107"
#define LOWBIT_D0_120 LOWBIT_D0_112 ", %112, %113, %114, %115"
#define LOWBIT_D0_128 LOWBIT_D0_120 ", %120, %121, %122, %123"

#define LOWBIT_D1_8 "%4, %5, %6, %7"
#define LOWBIT_D1_16 LOWBIT_D1_8 ", %12, %13, %14, %15"
#define LOWBIT_D1_24 LOWBIT_D1_16 ", %20, %21, %22, %23"
#define LOWBIT_D1_32 LOWBIT_D1_24 ", %28, %29, %30, %31"
#define LOWBIT_D1_40 LOWBIT_D1_32 ", %36, %37, %38, %39"
#define LOWBIT_D1_48 LOWBIT_D1_40 ", %44, %45, %46, %47"
#define LOWBIT_D1_56 LOWBIT_D1_48 ", %52, %53, %54, %55"
#define LOWBIT_D1_64 LOWBIT_D1_56 ", %60, %61, %62, %63"
#define LOWBIT_D1_72 LOWBIT_D1_64 ", %68, %69, %70, %71"
#define LOWBIT_D1_80 LOWBIT_D1_72 ", %76, %77, %78, %79"
#define LOWBIT_D1_88 LOWBIT_D1_80 ", %84, %85, %86, %87"
#define LOWBIT_D1_96 LOWBIT_D1_88 ", %92, %93, %94, %95"
#define LOWBIT_D1_104 LOWBIT_D1_96 ", %100, %101, %102, %103"
#define LOWBIT_D1_112 LOWBIT_D1_104 ", %108, %109, %110, %111"
#define LOWBIT_D1_120 LOWBIT_D1_112 ", %116, %117, %118, %119"
#define LOWBIT_D1_128 LOWBIT_D1_120 ", %124, %125, %126, %127"

#define LOWBIT_D_256 LOWBIT_D_128 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define LOWBIT_O_8(c, d, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define LOWBIT_O_16(c, d, i) LOWBIT_O_8(c, d, i), LOWBIT_O_8(c, d, i + 4)
#define LOWBIT_O_32(c, d, i) LOWBIT_O_16(c, d, i), LOWBIT_O_16(c, d, i + 8)
#define LOWBIT_O_64(c, d, i) LOWBIT_O_32(c, d, i), LOWBIT_O_32(c, d, i + 16)
#define LOWBIT_O_128(c, d, i) LOWBIT_O_64(c, d, i), LOWBIT_O_64(c, d, i + 32)
#define LOWBIT_O_256(c, d, i) LOWBIT_O_128(c, d, i), LOWBIT_O_128(c, d, i + 64)
#define LOWBIT_OO_8(c, d, i) LOWBIT_O_8(c, d[0], i), LOWBIT_O_8(c, d[1], i)
#define LOWBIT_OO_16(c, d, i) LOWBIT_OO_8(c, d, i), LOWBIT_OO_8(c, d, i + 4)
#define LOWBIT_OO_32(c, d, i) LOWBIT_OO_16(c, d, i), LOWBIT_OO_16(c, d, i + 8)
#define LOWBIT_OO_64(c, d, i) LOWBIT_OO_32(c, d, i), LOWBIT_OO_32(c, d, i + 16)
#define LOWBIT_OO_128(c, d, i) LOWBIT_OO_64(c, d, i), LOWBIT_OO_64(c, d, i + 32)
// clang-format on
