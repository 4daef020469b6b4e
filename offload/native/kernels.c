/* What the CPU does to state in host memory, each in one pass over it. See offload/adamw.py for the arithmetic. */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/mman.h>

#include "lanes.h"
#include "pool.h"

#define CHUNK 65536 /* elements a task: long beside the cost of handing it out, short beside a unit */

enum { NO_WEIGHT, BF16, FP32 };

typedef struct {
    const float *master, *exp_avg, *exp_avg_sq;
    const void *grad;
    float *new_master, *new_exp_avg, *new_exp_avg_sq;
    void *weight;
    int64_t numel;
    float scale, rest1, beta2, rest2, eps, decay, step_size, root_correction2; /* rest: 1 - beta */
    int32_t grad_type, weight_type, stream_state, weight_alone; /* alone: no new state is written */
} update;

#define UNROLL _Pragma("GCC unroll 4")
#define INLINE static inline __attribute__((always_inline))

INLINE void update_one(const update *u, int64_t i, int grad_type, int weight_type, int alone) {
    float grad = grad_type == BF16 ? from_bf16(((const uint16_t *)u->grad)[i]) : ((const float *)u->grad)[i];
    grad = grad * u->scale;
    float exp_avg = u->exp_avg[i];
    exp_avg = exp_avg + u->rest1 * (grad - exp_avg);
    float exp_avg_sq = u->beta2 * u->exp_avg_sq[i] + u->rest2 * grad * grad;
    float denominator = sqrtf(exp_avg_sq) / u->root_correction2 + u->eps;
    float master = u->master[i] * u->decay - u->step_size * (exp_avg / denominator);
    if (!alone) {
        u->new_exp_avg[i] = exp_avg;
        u->new_exp_avg_sq[i] = exp_avg_sq;
        u->new_master[i] = master;
    }
    if (weight_type == BF16) ((uint16_t *)u->weight)[i] = to_bf16(master);
    if (weight_type == FP32) ((float *)u->weight)[i] = master;
}

#define AT_ONCE 2 /* vectors: a line that is streamed is written whole before the next array's turn */

#define LINE 16 /* floats in a cache line */
#define AHEAD 512 /* elements: half a page of floats, over the border where the processor's prefetchers stop */

/* Elements i..i+AT_ONCE*LANES-1, the same operations in the same order as update_one. */
INLINE void update_lanes(
    const update *u, int64_t i, int grad_type, int weight_type, int alone, int stream, int stream_weight) {
    vec masters[AT_ONCE], exp_avgs[AT_ONCE], exp_avg_sqs[AT_ONCE];
    UNROLL for (int64_t j = i + AHEAD; j < i + AHEAD + AT_ONCE * LANES; j += LINE) {
        prefetch(u->exp_avg + j);
        prefetch(u->exp_avg_sq + j);
        prefetch(u->master + j);
        prefetch((const char *)u->grad + j * (grad_type == BF16 ? 2 : 4));
    }
    UNROLL for (int k = 0; k < AT_ONCE; k++) {
        int64_t j = i + k * LANES;
        vec grad = grad_type == BF16 ? vec_load_bf16((const uint16_t *)u->grad + j) : vec_load((const float *)u->grad + j);
        grad = vec_mul(grad, vec_set(u->scale));
        vec exp_avg = vec_load(u->exp_avg + j);
        exp_avg = vec_add(exp_avg, vec_mul(vec_set(u->rest1), vec_sub(grad, exp_avg)));
        vec exp_avg_sq = vec_mul(vec_set(u->beta2), vec_load(u->exp_avg_sq + j));
        exp_avg_sq = vec_add(exp_avg_sq, vec_mul(vec_mul(vec_set(u->rest2), grad), grad));
        vec denominator = vec_add(vec_div(vec_sqrt(exp_avg_sq), vec_set(u->root_correction2)), vec_set(u->eps));
        vec master = vec_mul(vec_load(u->master + j), vec_set(u->decay));
        masters[k] = vec_sub(master, vec_mul(vec_set(u->step_size), vec_div(exp_avg, denominator)));
        exp_avgs[k] = exp_avg;
        exp_avg_sqs[k] = exp_avg_sq;
    }
    if (!alone) {
        UNROLL for (int k = 0; k < AT_ONCE; k++) vec_put(u->new_exp_avg + i + k * LANES, exp_avgs[k], stream);
        UNROLL for (int k = 0; k < AT_ONCE; k++) vec_put(u->new_exp_avg_sq + i + k * LANES, exp_avg_sqs[k], stream);
        UNROLL for (int k = 0; k < AT_ONCE; k++) vec_put(u->new_master + i + k * LANES, masters[k], stream);
    }
    if (weight_type == BF16)
        UNROLL for (int k = 0; k < AT_ONCE; k++)
            vec_put_bf16((uint16_t *)u->weight + i + k * LANES, masters[k], stream_weight);
    if (weight_type == FP32)
        UNROLL for (int k = 0; k < AT_ONCE; k++) vec_put((float *)u->weight + i + k * LANES, masters[k], stream_weight);
}

static int aligned(const void *pointer, int64_t bytes) { return (uintptr_t)pointer % (uintptr_t)bytes == 0; }

/* Elements from the chunk's start to the first whose float begins a cache line. */
static int64_t head_length(const float *start, int64_t length) {
    int64_t head = (int64_t)(((uintptr_t)0 - (uintptr_t)start) / 4 % LINE);
    return head < length ? head : length;
}

INLINE void update_range(const update *u, int64_t start, int64_t stop, int grad_type, int weight_type, int alone) {
    int64_t i = start, first = start + head_length(u->new_master + start, stop - start);
    for (; i < first; i++) update_one(u, i, grad_type, weight_type, alone);
    const int64_t wide = 64;
    int stream = u->stream_state && aligned(u->new_master + i, wide) && aligned(u->new_exp_avg + i, wide) &&
                 aligned(u->new_exp_avg_sq + i, wide);
    int stream_weight = weight_type == BF16   ? aligned((uint16_t *)u->weight + i, wide / 2)
                        : weight_type == FP32 ? aligned((float *)u->weight + i, wide)
                                              : 0;
    /* the weight is never read, so it is streamed in place too: its lines are not fetched only to be overwritten */
    for (; i + AT_ONCE * LANES <= stop; i += AT_ONCE * LANES)
        update_lanes(u, i, grad_type, weight_type, alone, stream, stream_weight);
    for (; i < stop; i++) update_one(u, i, grad_type, weight_type, alone);
    stream_fence();
}

static void update_task(void *arguments, int64_t index) {
    const update *u = arguments;
    int64_t start = index * CHUNK, stop = start + CHUNK < u->numel ? start + CHUNK : u->numel;
    switch ((u->grad_type * 3 + u->weight_type) * 2 + u->weight_alone) {
        case (BF16 * 3 + NO_WEIGHT) * 2: update_range(u, start, stop, BF16, NO_WEIGHT, 0); break;
        case (BF16 * 3 + BF16) * 2: update_range(u, start, stop, BF16, BF16, 0); break;
        case (BF16 * 3 + BF16) * 2 + 1: update_range(u, start, stop, BF16, BF16, 1); break;
        case (BF16 * 3 + FP32) * 2: update_range(u, start, stop, BF16, FP32, 0); break;
        case (BF16 * 3 + FP32) * 2 + 1: update_range(u, start, stop, BF16, FP32, 1); break;
        case (FP32 * 3 + NO_WEIGHT) * 2: update_range(u, start, stop, FP32, NO_WEIGHT, 0); break;
        case (FP32 * 3 + BF16) * 2: update_range(u, start, stop, FP32, BF16, 0); break;
        case (FP32 * 3 + BF16) * 2 + 1: update_range(u, start, stop, FP32, BF16, 1); break;
        case (FP32 * 3 + FP32) * 2: update_range(u, start, stop, FP32, FP32, 0); break;
        default: update_range(u, start, stop, FP32, FP32, 1); break;
    }
}

void atoll_adamw(pool *threads, const update *u) {
    pool_run(threads, update_task, (void *)u, (u->numel + CHUNK - 1) / CHUNK);
}

/* total += addend, element by element. */
typedef struct {
    float *total;
    const void *addend;
    int64_t numel;
    int32_t addend_type;
} addition;

static void add_task(void *arguments, int64_t index) {
    const addition *a = arguments;
    int64_t i = index * CHUNK, stop = i + CHUNK < a->numel ? i + CHUNK : a->numel;
    if (a->addend_type == BF16) {
        const uint16_t *addend = a->addend;
        for (; i + LANES <= stop; i += LANES)
            vec_store(a->total + i, vec_add(vec_load(a->total + i), vec_load_bf16(addend + i)));
        for (; i < stop; i++) a->total[i] = a->total[i] + from_bf16(addend[i]);
    } else {
        const float *addend = a->addend;
        for (; i + LANES <= stop; i += LANES)
            vec_store(a->total + i, vec_add(vec_load(a->total + i), vec_load(addend + i)));
        for (; i < stop; i++) a->total[i] = a->total[i] + addend[i];
    }
}

void atoll_accumulate(pool *threads, const addition *a) {
    pool_run(threads, add_task, (void *)a, (a->numel + CHUNK - 1) / CHUNK);
}

/* One fp64 sum for each SUM_BLOCK elements, always by the same tree: SUM_LANES running sums, element i to sum
 * i % SUM_LANES, then halves added to halves. The square of a float is exact in fp64, so fused or not is the same. */
#define SUM_BLOCK 16384
#define SUM_LANES 16

typedef struct {
    const void *values;
    double *sums; /* one a block */
    int64_t numel;
    int32_t type;
} squares;

#if LANES == 8
INLINE __m256d add_square(__m256d sum, __m128 values) {
    __m256d wide = _mm256_cvtps_pd(values);
#if defined(__FMA__)
    return _mm256_fmadd_pd(wide, wide, sum);
#else
    return _mm256_add_pd(sum, _mm256_mul_pd(wide, wide));
#endif
}
#endif

INLINE void square_block(const squares *s, int64_t index, int type) {
    int64_t i = index * SUM_BLOCK, stop = i + SUM_BLOCK < s->numel ? i + SUM_BLOCK : s->numel;
    const uint16_t *bf16 = s->values;
    const float *fp32 = s->values;
    double sums[SUM_LANES] = {0};
#if LANES == 16
    __m512d low = _mm512_setzero_pd(), high = low;
    for (; i + SUM_LANES <= stop; i += SUM_LANES) {
        __m512 x = type == BF16 ? vec_load_bf16(bf16 + i) : vec_load(fp32 + i);
        __m512d a = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
        __m512d b = _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)));
        low = _mm512_fmadd_pd(a, a, low);
        high = _mm512_fmadd_pd(b, b, high);
    }
    _mm512_storeu_pd(sums, low);
    _mm512_storeu_pd(sums + 8, high);
#elif LANES == 8
    __m256d a = _mm256_setzero_pd(), b = a, c = a, d = a;
    for (; i + SUM_LANES <= stop; i += SUM_LANES) {
        __m256 x = type == BF16 ? vec_load_bf16(bf16 + i) : vec_load(fp32 + i);
        __m256 y = type == BF16 ? vec_load_bf16(bf16 + i + 8) : vec_load(fp32 + i + 8);
        a = add_square(a, _mm256_castps256_ps128(x));
        b = add_square(b, _mm256_extractf128_ps(x, 1));
        c = add_square(c, _mm256_castps256_ps128(y));
        d = add_square(d, _mm256_extractf128_ps(y, 1));
    }
    _mm256_storeu_pd(sums, a);
    _mm256_storeu_pd(sums + 4, b);
    _mm256_storeu_pd(sums + 8, c);
    _mm256_storeu_pd(sums + 12, d);
#endif
    for (int64_t lane = 0; i < stop; i++, lane = (lane + 1) % SUM_LANES) { /* i is a multiple of SUM_LANES here */
        double x = type == BF16 ? from_bf16(bf16[i]) : fp32[i];
        sums[lane] = sums[lane] + x * x;
    }
    for (int width = SUM_LANES / 2; width; width /= 2)
        for (int lane = 0; lane < width; lane++) sums[lane] = sums[lane] + sums[lane + width];
    s->sums[index] = sums[0];
}

static void square_task(void *arguments, int64_t index) {
    const squares *s = arguments;
    if (s->type == BF16)
        square_block(s, index, BF16);
    else
        square_block(s, index, FP32);
}

void atoll_squares(pool *threads, const squares *s) {
    pool_run(threads, square_task, (void *)s, (s->numel + SUM_BLOCK - 1) / SUM_BLOCK);
}

/* A copy whose destination is streamed: no line of it is read first, and the caches keep what they hold. */
static void copy_streamed(char *into, const char *from, int64_t length) {
#if LANES > 1
    const int64_t wide = 4 * LANES;
    int64_t head = (int64_t)(((uintptr_t)0 - (uintptr_t)into) % (uintptr_t)wide);
    if (head > length) head = length;
    memcpy(into, from, (size_t)head);
    int64_t i = head;
    for (; i + 4 * wide <= length; i += 4 * wide) {
        prefetch(from + i + 2048);
        prefetch(from + i + 2112);
#if LANES == 16
        prefetch(from + i + 2176);
        prefetch(from + i + 2240);
#endif
        vec a = vec_load((const float *)(from + i)), b = vec_load((const float *)(from + i + wide));
        vec d = vec_load((const float *)(from + i + 2 * wide)), e = vec_load((const float *)(from + i + 3 * wide));
        vec_stream((float *)(into + i), a);
        vec_stream((float *)(into + i + wide), b);
        vec_stream((float *)(into + i + 2 * wide), d);
        vec_stream((float *)(into + i + 3 * wide), e);
    }
    memcpy(into + i, from + i, (size_t)(length - i));
    stream_fence();
#else
    memcpy(into, from, (size_t)length);
#endif
}

#define COPY_CHUNK (1 << 20)

typedef struct {
    char *into;
    const char *from;
    int64_t size_bytes;
} copying;

static void copy_task(void *arguments, int64_t index) {
    const copying *c = arguments;
    int64_t start = index * COPY_CHUNK;
    copy_streamed(c->into + start, c->from + start, c->size_bytes - start < COPY_CHUNK ? c->size_bytes - start : COPY_CHUNK);
}

void atoll_copy(pool *threads, const copying *c) {
    pool_run(threads, copy_task, (void *)c, (c->size_bytes + COPY_CHUNK - 1) / COPY_CHUNK);
}

/* Gives every page of a mapping its memory now; error is 0 or the errno of a task that failed. */
#define POPULATE_CHUNK (16 << 20)
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

typedef struct {
    char *start; /* page-aligned */
    int64_t size_bytes;
    int32_t error;
} population;

static void populate_task(void *arguments, int64_t index) {
    population *p = arguments;
    int64_t start = index * POPULATE_CHUNK;
    int64_t length = p->size_bytes - start < POPULATE_CHUNK ? p->size_bytes - start : POPULATE_CHUNK;
    int error;
    if (__atomic_load_n(&p->error, __ATOMIC_RELAXED)) return;
    do error = madvise(p->start + start, (size_t)length, MADV_POPULATE_WRITE) ? errno : 0;
    while (error == EINTR || error == EAGAIN);
    if (error) __atomic_store_n(&p->error, error, __ATOMIC_RELAXED);
}

void atoll_populate(pool *threads, population *p) {
    pool_run(threads, populate_task, p, (p->size_bytes + POPULATE_CHUNK - 1) / POPULATE_CHUNK);
}

/* A checksum of each piece of some memory, by a function of another library: crcs[i] = ~function(piece i, its length,
 * ~0). What is to be copied there first is checked as it passes: it is read from memory once. */
#define CHECK_BLOCK (16 << 10) /* bytes: the nearest cache holds them until they are checked */

typedef uint32_t (*checksum)(const unsigned char *, int, uint32_t);

typedef struct {
    checksum function;
    char *start;
    int64_t size_bytes, piece_bytes;
    const copying *copies; /* into this memory, in their order there, apart */
    int64_t num_copies;
    uint32_t *crcs;
} checking;

/* The first copy that ends behind an address. */
static int64_t first_copy(const checking *c, const char *address) {
    int64_t low = 0, high = c->num_copies;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (c->copies[middle].into + c->copies[middle].size_bytes > address)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

static void check_task(void *arguments, int64_t index) {
    const checking *c = arguments;
    char *place = c->start + index * c->piece_bytes, *end = c->start + c->size_bytes;
    if (end - place > c->piece_bytes) end = place + c->piece_bytes;
    uint32_t crc = ~(uint32_t)0;
    const copying *copy = c->copies + first_copy(c, place), *last = c->copies + c->num_copies;
    while (place < end) {
        char *until = copy < last && copy->into < end ? copy->into : end;
        if (until > place) { /* it is there already */
            crc = c->function((const unsigned char *)place, (int)(until - place), crc);
            place = until;
            continue;
        }
        const char *from = copy->from + (place - copy->into);
        int64_t left = copy->into + copy->size_bytes - place, length = end - place;
        if (length > left) length = left;
        if (length > CHECK_BLOCK) length = CHECK_BLOCK;
        copy_streamed(place, from, length);
        crc = c->function((const unsigned char *)from, (int)length, crc);
        place += length;
        if (length == left) copy++;
    }
    c->crcs[index] = ~crc;
}

void atoll_checksums(pool *threads, const checking *c) {
    pool_run(threads, check_task, (void *)c, (c->size_bytes + c->piece_bytes - 1) / c->piece_bytes);
}

int atoll_lanes(void) { return LANES; }
