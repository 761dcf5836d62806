// Kernels for processors with AVX2 and FMA: eight elements at once.

#if defined(__x86_64__)

#include "avx2.h"
#include "kernel.h"

namespace narrowkv {
void attend_avx2(const Problems& problems, int threads) { attend<Worker>(problems, threads); }
}  // namespace narrowkv

#endif
