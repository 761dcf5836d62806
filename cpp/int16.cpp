// Kernels in words, for processors with AVX-512 BW, VBMI and VNNI.

#if defined(__x86_64__)

#include "avx512.h"
#include "int16_values.h"
#include "stream_int16_keys.h"
#include "stream_int16_values.h"

namespace narrowkv {
void attend_int16(const Problems& problems, int threads) {
    Problems streams, codes;
    for (const Problem* problem : problems) (problem->keys.streams ? streams : codes).push_back(problem);
    if (!streams.empty()) attend<Int16Worker<Int16StreamKeys, Int16StreamValues>>(streams, threads);
    if (!codes.empty()) attend<Int16Worker<Int16Keys, Int16Values>>(codes, threads);
}
}  // namespace narrowkv

#endif
