// All routed experts of a layer in one call: y_t = sum_k w_tk * down_e(silu(gate_e x_t) * up_e x_t), equation 12.
//
// Tokens are counted and sorted by expert. Then, with a barrier between the steps:
//   1. gate and up rows of every chosen expert, and silu(gate) * up, into one hidden row per pair of token and expert;
//   2. hidden rows into the form that the down kernel reads;
//   3. down rows, times the gate weight, added into y in ascending order of experts.
// Step 3 shares out rows of y, so no two threads add to one number, and a token's sum has the same order in any batch.
// Accumulation is float32 throughout; with bfloat16 tokens the hidden row is rounded to bfloat16 once, as torch does.
//
// Shapes: T tokens, D hidden, E experts, F expert width, K chosen, P = T * K pairs of token and expert.
#include "experts.h"

namespace soli {
namespace {

int run(const Experts& layer, int64_t dtype, int64_t threads, int64_t T, const void* x, const int64_t* ids,
        const float* weights, void* y) {
    static thread_local Scratch scratch;
    const int64_t D = layer.in.I, F = layer.in.O, P = T * layer.K, size = dtype == FLOAT ? 4 : 2;
    Tokens in(layer.isa, layer.in, dtype), out(layer.isa, layer.out, dtype);
    const size_t wanted = Pairs::bytes(layer.E, P) + in.bytes(P) + out.bytes(P) + Scratch::bytes<float>(P * F) +
                          Scratch::bytes<float>(T * D);
    if (!scratch.reserve(wanted)) return NO_MEMORY;
    Pairs pairs(scratch, layer.E, P);
    pairs.sort(layer.E, layer.K, P, ids, weights);
    const int64_t most = down_rows(D, T, P, pairs.experts, threads);
    in.data = scratch.take<uint8_t>(in.bytes(P)), out.data = scratch.take<uint8_t>(out.bytes(P));
    float *hidden = scratch.take<float>(P * F), *sum = scratch.take<float>(T * D);
    const int64_t span = stretch(F, T, 4), blocks = (F + span - 1) / span;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for
        for (int64_t p = 0; p < P; p++) in.put(p, static_cast<const uint8_t*>(x) + pairs.token[p] * D * size, dtype);
#pragma omp for schedule(dynamic, at_once(pairs.experts* blocks, T, 3 * threads))
        for (int64_t piece = 0; piece < pairs.experts * blocks; piece++) {
            const int64_t e = pairs.chosen[piece / blocks];
            hidden_rows(layer, e, in, pairs.start[e], pairs.start[e + 1], piece % blocks * span, span, hidden);
        }
#pragma omp for
        for (int64_t p = 0; p < P; p++) out.put(p, hidden + p * F, FLOAT);
#pragma omp for schedule(dynamic)
        for (int64_t row = 0; row < D; row += most) {
            const int64_t rows = std::min(most, D - row);
            for (int64_t t = 0; t < T; t++) std::fill(sum + t * D + row, sum + t * D + row + rows, 0.0f);
            for (int64_t i = 0; i < pairs.experts; i++) add_rows(layer, pairs.chosen[i], out, pairs, row, most, sum);
            for (int64_t t = 0; t < T; t++) write_out(sum + t * D + row, rows, y, t * D + row, dtype);
        }
    }
    return NO_ERROR;
}

}  // namespace

// x, y (T, D) of `dtype`, ids (T, K), weights (T, K). `table` holds E matrices of gate, then E of up, then E of down.
// Returns NO_ERROR, BAD_EXPERT_ID or NO_MEMORY.
extern "C" int soli_experts(int64_t isa, int64_t in_format, int64_t in_group, int64_t out_format, int64_t out_group,
                            int64_t E, int64_t D, int64_t F, const Matrix* table, int64_t T, int64_t K, int64_t dtype,
                            const void* x, const int64_t* ids, const float* weights, void* y, int64_t threads) {
    for (int64_t p = 0; p < T * K; p++)
        if (ids[p] < 0 || ids[p] >= E) return BAD_EXPERT_ID;
    const Experts layer = {
        kernels(isa), E, K, {in_format, F, D, in_group}, {out_format, D, F, out_group}, table, table + E,
        table + 2 * E};
    // Scratch stays below 128 MiB; parts of a batch do not change a token's bits.
    const int64_t per_token = K * (8 * padded(F) + 4 * padded(D)) + 4 * D,
                  most = std::max<int64_t>(64, (128 << 20) / per_token);
    const int64_t bytes = D * (dtype == FLOAT ? 4 : 2);
    for (int64_t t = 0; t < T; t += most) {
        const int failed = run(layer, dtype, threads, std::min(most, T - t), static_cast<const uint8_t*>(x) + t * bytes,
                               ids + t * K, weights + t * K, static_cast<uint8_t*>(y) + t * bytes);
        if (failed) return failed;
    }
    return NO_ERROR;
}

}  // namespace soli
