/* Vectors of LANES floats: AVX-512, AVX2, or plain C that the compiler may vectorise.
 *
 * Only operations that IEEE 754 rounds correctly are used (add, subtract, multiply, divide, square root) and none is
 * fused, so an element's result is the same in every width, in a tail and on every machine. Compile with
 * -ffp-contract=off.
 */
#ifndef ATOLL_LANES_H
#define ATOLL_LANES_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* bf16 by round to nearest even; every NaN becomes 0x7fc0. AVX512-BF16's own conversion flushes denormals. */
static inline uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (value != value) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float from_bf16(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

#if defined(__AVX512F__)
#define LANES 16
typedef __m512 vec;
#define vec_set(x) _mm512_set1_ps(x)
#define vec_load(p) _mm512_loadu_ps(p)
#define vec_store(p, x) _mm512_storeu_ps(p, x)
#define vec_stream(p, x) _mm512_stream_ps(p, x)
#define vec_add(a, b) _mm512_add_ps(a, b)
#define vec_sub(a, b) _mm512_sub_ps(a, b)
#define vec_mul(a, b) _mm512_mul_ps(a, b)
#define vec_div(a, b) _mm512_div_ps(a, b)
#define vec_sqrt(a) _mm512_sqrt_ps(a)

static inline vec vec_load_bf16(const uint16_t *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

static inline __m256i vec_to_bf16(vec x) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
}
#define vec_store_bf16(p, x) _mm256_storeu_si256((__m256i *)(p), vec_to_bf16(x))
#define vec_stream_bf16(p, x) _mm256_stream_si256((__m256i *)(p), vec_to_bf16(x))

#elif defined(__AVX2__)
#define LANES 8
typedef __m256 vec;
#define vec_set(x) _mm256_set1_ps(x)
#define vec_load(p) _mm256_loadu_ps(p)
#define vec_store(p, x) _mm256_storeu_ps(p, x)
#define vec_stream(p, x) _mm256_stream_ps(p, x)
#define vec_add(a, b) _mm256_add_ps(a, b)
#define vec_sub(a, b) _mm256_sub_ps(a, b)
#define vec_mul(a, b) _mm256_mul_ps(a, b)
#define vec_div(a, b) _mm256_div_ps(a, b)
#define vec_sqrt(a) _mm256_sqrt_ps(a)

static inline vec vec_load_bf16(const uint16_t *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

static inline __m128i vec_to_bf16(vec x) {
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
#define vec_store_bf16(p, x) _mm_storeu_si128((__m128i *)(p), vec_to_bf16(x))
#define vec_stream_bf16(p, x) _mm_stream_si128((__m128i *)(p), vec_to_bf16(x))

#else
#define LANES 1
typedef float vec;
#define vec_set(x) (x)
#define vec_load(p) (*(p))
#define vec_store(p, x) (*(p) = (x))
#define vec_stream vec_store
#define vec_add(a, b) ((a) + (b))
#define vec_sub(a, b) ((a) - (b))
#define vec_mul(a, b) ((a) * (b))
#define vec_div(a, b) ((a) / (b))
#define vec_sqrt(a) sqrtf(a)
#define vec_load_bf16(p) from_bf16(*(p))
#define vec_store_bf16(p, x) (*(p) = to_bf16(x))
#define vec_stream_bf16 vec_store_bf16
#endif

static inline void vec_put(float *p, vec x, int stream) {
    if (stream)
        vec_stream(p, x);
    else
        vec_store(p, x);
}

static inline void vec_put_bf16(uint16_t *p, vec x, int stream) {
    if (stream)
        vec_stream_bf16(p, x);
    else
        vec_store_bf16(p, x);
}

/* Streaming stores are weakly ordered: fence before another thread may be told that the memory is written. */
static inline void stream_fence(void) {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

#if defined(__x86_64__)
#define prefetch(p) _mm_prefetch((const char *)(p), _MM_HINT_T0)
#else
#define prefetch(p) __builtin_prefetch(p)
#endif

#endif
