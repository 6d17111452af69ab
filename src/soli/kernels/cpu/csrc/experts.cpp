// All routed experts of a layer in one call: y_t = sum_k w_tk * down_e(silu(gate_e x_t) * up_e x_t), equation 12.
//
// Pairs of token and expert are sorted by expert. Then, with a barrier between the steps:
//   1. gate and up rows of every chosen expert, and silu(gate) * up, into one hidden row per pair;
//   2. hidden rows into the form that the down kernel reads;
//   3. down rows, times the router's weight, added into y in ascending order of experts.
// A work item of step 3 is a block of rows of y, so no two threads add to one number, and a token's sum has the same
// order in any batch. Accumulation is float32 throughout; with bfloat16 tokens the hidden row is rounded to bfloat16
// once, as torch does.
//
// Shapes: T tokens, D hidden, E experts, F expert width, K chosen, P = T * K pairs of token and expert.
#include "experts.h"

#include "team.h"

namespace soli {
namespace {

constexpr int64_t MAX_SCRATCH = 128 << 20;  // bytes; longer batches are computed in parts
constexpr int64_t MIN_PART = 64;            // tokens

// The experts `begin` ... `end` - 1 are added to `sum` (T, D), or where it is null to zero; with the last ones the sums
// are y.
int run_experts(const Experts& layer, int64_t dtype, int64_t max_threads, int64_t T, const void* x, const int64_t* ids,
                const float* weights, void* y, int64_t begin, int64_t end, float* sum) {
    static thread_local Scratch scratch;
    static thread_local ThreadBudget budget;
    Team team(budget, max_threads);
    const int64_t threads = team.threads;
    const int64_t D = layer.in.I;
    const int64_t F = layer.in.O;
    const int64_t P = T * layer.K;
    Activations in(layer.isa, layer.in, dtype);
    Activations out(layer.isa, layer.out, dtype);
    const size_t bytes = ExpertPairs::bytes(layer.E, P) + in.bytes(P) + out.bytes(P) + Scratch::bytes<float>(P * F) +
                         Scratch::bytes<float>(T * D);
    if (!scratch.reserve(bytes)) return NO_MEMORY;
    ExpertPairs pairs(scratch, layer.E, P);
    pairs.sort_by_expert(layer.E, layer.K, P, ids, weights);
    in.data = scratch.take<uint8_t>(in.bytes(P));
    out.data = scratch.take<uint8_t>(out.bytes(P));
    float* hidden = scratch.take<float>(P * F);
    const bool starts_at_zero = !sum;
    if (!sum) sum = scratch.take<float>(T * D);
    const int64_t* first = std::lower_bound(pairs.active, pairs.active + pairs.active_count, begin);
    const int64_t* last = std::lower_bound(pairs.active, pairs.active + pairs.active_count, end);
    const int64_t down_rows = down_rows_per_item(D, T, P, pairs.active_count, threads);
    const int64_t gate_rows = rows_per_item(F, T, 4);
    const int64_t gate_blocks = (F + gate_rows - 1) / gate_rows;
    const int64_t gate_items = (last - first) * gate_blocks;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for nowait
        for (int64_t p = 0; p < P; p++)
            in.pack(p, static_cast<const uint8_t*>(x) + pairs.token[p] * D * dtype_bytes(dtype), dtype);
        team.barrier();
#pragma omp for schedule(dynamic, omp_chunk(gate_items, T, 3 * threads)) nowait
        for (int64_t item = 0; item < gate_items; item++) {
            const int64_t e = first[item / gate_blocks];
            const int64_t row = item % gate_blocks * gate_rows;
            gate_up(layer, e, in, pairs.start[e], pairs.start[e + 1], row, gate_rows, hidden);
        }
        team.barrier();
#pragma omp for nowait
        for (int64_t p = 0; p < P; p++) out.pack(p, hidden + p * F, FLOAT32);
        team.barrier();
#pragma omp for schedule(dynamic) nowait
        for (int64_t row = 0; row < D; row += down_rows) {
            const int64_t rows = std::min(down_rows, D - row);
            for (int64_t t = 0; t < T && starts_at_zero; t++)
                std::fill(sum + t * D + row, sum + t * D + row + rows, 0.0f);
            for (const int64_t* e = first; e < last; e++) down_and_combine(layer, *e, out, pairs, row, down_rows, sum);
            for (int64_t t = 0; t < T && end == layer.E; t++) store_as(dtype, sum + t * D + row, rows, y, t * D + row);
        }
        team.barrier();
    }
    return NO_ERROR;
}

}  // namespace

// x, y (T, D) of `dtype`, ids (T, K), weights (T, K). `table` holds E matrices of gate, then E of up, then E of down.
// All experts at once with `begin` 0, `end` E and without `sum`; or some after the others, in ascending order, where
// only their matrices are read and `sum` (T, D), zeros before the first, carries the sums from call to call.
// Returns NO_ERROR, BAD_EXPERT_ID or NO_MEMORY.
extern "C" int soli_experts(int64_t isa, int64_t in_format, int64_t in_group, int64_t out_format, int64_t out_group,
                            int64_t E, int64_t D, int64_t F, const Matrix* table, int64_t T, int64_t K, int64_t dtype,
                            const void* x, const int64_t* ids, const float* weights, void* y, int64_t threads,
                            int64_t begin, int64_t end, float* sum) {
    for (int64_t p = 0; p < T * K; p++)
        if (ids[p] < 0 || ids[p] >= E) return BAD_EXPERT_ID;
    const Layout in = {in_format, F, D, in_group};
    const Layout out = {out_format, D, F, out_group};
    const Experts layer = {kernels(isa), E, K, in, out, table, table + E, table + 2 * E};
    const int64_t scratch_per_token = K * (8 * padded(F) + 4 * padded(D)) + 4 * D;
    const int64_t part = std::max<int64_t>(MIN_PART, MAX_SCRATCH / scratch_per_token);
    const int64_t token_bytes = D * dtype_bytes(dtype);
    for (int64_t t = 0; t < T; t += part) {
        const uint8_t* part_x = static_cast<const uint8_t*>(x) + t * token_bytes;
        uint8_t* part_y = static_cast<uint8_t*>(y) + t * token_bytes;
        const int error = run_experts(layer, dtype, threads, std::min(part, T - t), part_x, ids + t * K,
                                      weights + t * K, part_y, begin, end, sum ? sum + t * D : nullptr);
        if (error) return error;
    }
    return NO_ERROR;
}

}  // namespace soli
