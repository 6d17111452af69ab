// The feed-forward part of one layer for T rows: x += network(norm x), a dense network or routed and shared experts
// (equation 12). What every row goes through is one expert that all rows chose with weight one.
#pragma once
#include "forward_router.h"

namespace soli {
namespace {

constexpr int64_t CROWD = 64;  // rows beyond which routing is worth sharing out

class FeedForwardStep {
public:
    FeedForwardStep(const ForwardPass& pass, const FeedForward& f, const Routings& decisions, const uint8_t* muted,
                    Area area)
        : pass(pass),
          call(pass.call),
          f(f),
          decisions(decisions),
          muted(muted),
          T(call.T),
          E(f.router.E()),
          P(E ? T * f.router.K : 0),
          all{pass.isa, 1, 1, f.gate.layout, f.down.layout, &f.gate.matrix, &f.up.matrix, &f.down.matrix},
          some{pass.isa, E, f.router.K, f.expert_in, f.expert_out, f.experts, f.experts + E, f.experts + 2 * E},
          router_in(pass.isa, f.router.weight.layout, FLOAT),
          all_in(pass.isa, all.in, call.dtype),
          all_out(pass.isa, all.out, call.dtype),
          row_in(pass.isa, some.in, call.dtype),
          some_in(row_in),
          some_out(pass.isa, some.out, call.dtype),
          everyone(area, 1, T),
          pairs(area, E, P) {
        take_made(pass, area, router_in, T), take_made(pass, area, all_in, T), take_made(pass, area, row_in, T);
        take(area, all_out, T), take(area, some_in, P), take(area, some_out, P);
        row = pass.own<float>(area, call.D), logits = area.take<float>(T * E), experts = area.take<int64_t>(1);
        all_hidden = area.take<float>(T * all.in.O), some_hidden = area.take<float>(P * some.in.O);
        used = area.used;
    }

    size_t used;

    void run() {
        pass.each_row([&](int64_t t) { begin(t); });
        const int64_t some_spans = spans(some.in.O);
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < spans(all.in.O); i++) hidden(all, 0, all_in, 0, T, i, all_hidden, all_out);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < blocks(E); i++) product(f.router.weight, router_in, T, i, {}, logits);
        if (T > CROWD) {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < T; t++)
                if (E) decide(f.router, logits + t * E, muted, t, decisions);
#pragma omp single
            sort();
#pragma omp for schedule(static)
            for (int64_t p = 0; p < P; p++) seat(p);
        } else {
#pragma omp single
            choose();
        }
        everyone.experts = all.in.O > 0, pairs.experts = *experts;
        const int64_t pieces = pairs.experts * some_spans, down = down_rows(call.D, T, P, pairs.experts, call.threads);
#pragma omp for schedule(dynamic, at_once(pieces, T, 3 * call.threads))  // experts have different numbers of rows
        for (int64_t i = 0; i < pieces; i++) {
            const int64_t e = pairs.chosen[i / some_spans];
            hidden(some, e, some_in, pairs.start[e], pairs.start[e + 1], i % some_spans, some_hidden, some_out);
        }
#pragma omp for schedule(static)
        for (int64_t row = 0; row < call.D; row += down) {
            for (int64_t i = 0; i < pairs.experts; i++)
                add_rows(some, pairs.chosen[i], some_out, pairs, row, down, pass.x);
            if (everyone.experts) add_rows(all, 0, all_out, everyone, row, down, pass.x);
        }
    }

private:
    // The row, normed, for the first products.
    void begin(int64_t t) {
        normed(f.norm, pass.x + t * call.D, call.D, row);
        if (all.in.O) all_in.put(t, row, FLOAT);
        if (E) router_in.put(t, row, FLOAT), row_in.put(t, row, FLOAT);
    }

    static int64_t spans(int64_t F) { return (F + STEP - 1) / STEP; }

    // STEP hidden values of each pair of one expert, made and put ready for the down product.
    void hidden(const Experts& layer, int64_t e, const Tokens& in, int64_t begin, int64_t end, int64_t span,
                float* values, Tokens& out) {
        const int64_t F = layer.in.O, first = span * STEP, last = std::min(F, first + STEP);
        const int64_t most = end - begin < FEW ? STEP : ROWS;
        for (int64_t at = first; at < last; at += most) hidden_rows(layer, e, in, begin, end, at, most, values);
        for (int64_t p = begin; p < end; p++) out.put_part(p, first, values + p * F + first, last - first);
    }

    // The routers' decisions, and the rows in the order of their experts.
    void choose() {
        for (int64_t t = 0; t < T && E; t++) decide(f.router, logits + t * E, muted, t, decisions);
        sort();
        for (int64_t p = 0; p < P; p++) seat(p);
    }

    void sort() {
        everyone.everyone(T), pairs.sort(E, f.router.K, P, decisions.ids, decisions.weights);
        *experts = pairs.experts;
    }

    void seat(int64_t p) {
        const int64_t bytes = row_in.token_bytes();
        std::memcpy(some_in.data + p * bytes, row_in.data + pairs.token[p] * bytes, bytes);
    }

    const ForwardPass& pass;
    const ForwardArgs& call;
    const FeedForward& f;
    const Routings& decisions;
    const uint8_t* muted;
    const int64_t T, E, P;
    const Experts all, some;
    Tokens router_in, all_in, all_out, row_in, some_in, some_out;
    Pairs everyone, pairs;
    float *row, *logits, *all_hidden, *some_hidden;
    int64_t* experts;  // how many were chosen: `pairs` is each thread's own, its arrays are not
};

}  // namespace
}  // namespace soli
