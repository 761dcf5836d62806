// Kernels in words, for processors with AVX-512 BW, VBMI and VNNI.

#if defined(__x86_64__)

#include "avx512.h"
#include "int16_kernel.h"

namespace narrowkv {
void attend_int16(const Problem& problem) {
    if (problem.keys.streams) return attend<Int16Worker<Int16StreamKeys, Int16StreamValues>>(problem);
    attend<Int16Worker<Int16Keys, Int16Values>>(problem);
}
}  // namespace narrowkv

#endif
