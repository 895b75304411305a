// Compiles a file of kernels once for each instruction set, and calls the one that this processor has.
//
// A file X.cpp includes its headers, defines AOT_KERNELS as the name of a file that contains functions, and includes this one. The functions
// exist then in the namespaces aot::baseline and, on x86-64 with GCC, aot::avx2 and aot::avx512; AOT_CALL(f, ...) calls the best of them.
// Explicit vectors are lowered where they are written, so that an inline function for a lesser target would not widen: hence whole files.

#pragma once

namespace aot {

enum class Isa { baseline, avx2, avx512 };

// The widest instruction set that was compiled in and runs here; AOT_FAST_ISA=baseline|avx2 lowers it.
Isa isa();

}  // namespace aot

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define AOT_X86 1
#else
#define AOT_X86 0
#endif

#if AOT_X86
#define AOT_CALL(function, ...)                                              \
  (::aot::isa() == ::aot::Isa::avx512 ? ::aot::avx512::function(__VA_ARGS__) \
   : ::aot::isa() == ::aot::Isa::avx2 ? ::aot::avx2::function(__VA_ARGS__)   \
                                      : ::aot::baseline::function(__VA_ARGS__))
#else
#define AOT_CALL(function, ...) ::aot::baseline::function(__VA_ARGS__)
#endif
