// Kernels for trellis-coded streams in words, for processors with AVX2 alone.

#if defined(__x86_64__)

#include "avx2.h"
#include "int16_worker.h"
#include "avx2_stream_keys.h"
#include "avx2_stream_values.h"

namespace narrowkv {
void attend_avx2_int16(const Problems& problems, int threads) { attend<Int16Worker<Avx2StreamKeys, Avx2StreamValues>>(problems, threads); }
}  // namespace narrowkv

#endif
