// See isa.h. No include guard: every file of kernels includes this once, after AOT_KERNELS is defined.

#if AOT_X86
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define AOT_ISA avx512
#define AOT_WIDTH 16
#include "vector.inc"
#include AOT_KERNELS
#undef AOT_ISA
#undef AOT_WIDTH
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define AOT_ISA avx2
#define AOT_WIDTH 8
#include "vector.inc"
#include AOT_KERNELS
#undef AOT_ISA
#undef AOT_WIDTH
#pragma GCC pop_options
#endif

#define AOT_ISA baseline
#define AOT_WIDTH 4
#include "vector.inc"
#include AOT_KERNELS
#undef AOT_ISA
#undef AOT_WIDTH
