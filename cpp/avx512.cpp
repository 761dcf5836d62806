// Kernels for processors with AVX-512 F and BW: sixteen elements at once.

#if defined(__x86_64__)

#include "avx512.h"
#include "kernel.h"

namespace narrowkv {
void attend_avx512(const Problems& problems, int threads) { attend<Worker>(problems, threads); }
}  // namespace narrowkv

#endif
