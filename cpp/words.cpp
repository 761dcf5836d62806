// Kernels in words, for processors with AVX-512 BW, VBMI and VNNI.

#if defined(__x86_64__)

#include "avx512.h"
#include "words_kernel.h"

namespace narrowkv {
void attend_words(const Problem& problem) {
    if (problem.keys.streams) return attend<WordWorker<WordStreamKeys, WordStreamValues>>(problem);
    attend<WordWorker<WordKeys, WordValues>>(problem);
}
}  // namespace narrowkv

#endif
