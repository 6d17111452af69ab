// The arguments of soli_forward: the structs that Python fills in. Each has the same fields, in the same order, as the
// ctypes class of its name in ../structs.py; struct_layouts.cpp exports what is compared when the library is loaded.
//
// Shapes: T tokens, D hidden, H heads, N non-rotary, R rotary and V value width, C latent, X = C + R, L query latent,
// E experts, K chosen, G groups, F width of a feed-forward network; P KV blocks of S slots, W blocks of a sequence;
// J heads and I width of an indexer.
#pragma once
#include <algorithm>

#include "kernels.h"

namespace soli {

constexpr int64_t MAX_TOKENS = 8192;
constexpr int64_t MAX_GROUPS = 64;

// float32 or bfloat16 numbers in place; without data there is no vector.
struct Vector {
    const void* data;
    int64_t dtype;

    float operator[](int64_t i) const {
        return dtype == FLOAT32 ? static_cast<const float*>(data)[i]
                                : float_from_bf16(static_cast<const uint16_t*>(data)[i]);
    }
    // n numbers from `at` on.
    void copy(int64_t at, int64_t n, float* to) const {
        if (dtype == FLOAT32) std::copy_n(static_cast<const float*>(data) + at, n, to);
        else
            for (int64_t i = 0; i < n; i++) to[i] = float_from_bf16(static_cast<const uint16_t*>(data)[at + i]);
    }
};

struct Norm {
    Vector weight;
    double eps;
};

// A matrix in any format; with no rows there is no matrix.
struct Weight {
    Matrix matrix;
    Layout layout;
};

struct Attention {
    Norm norm;     // of the layer's input
    Norm q_norm;   // of the query latent
    Norm kv_norm;  // of the key-value latent
    Weight q_a;    // (L, D); none where queries have no latent, and q_b reads the hidden state itself
    Weight q_b;    // (H * (N + R), L)
    Weight kv_a;   // (X, D)
    Weight kv_b;   // (H * (N + V), C)
    Weight o;      // (D, H * V)
    Vector q_a_bias;
    Vector kv_a_bias;
    Vector o_bias;
    int64_t H, N, R, V;
    int64_t interleaved;  // rotary pairs are neighbours; else one of each half
    double scale;         // of the scores
    // Sparse attention: a token attends to `topk` of the tokens up to itself, 0 for all of them. A layer with an
    // indexer selects them; one without attends to the selection of the last that has.
    int64_t topk;
    Weight index_q;        // (J * I, L)
    Weight index_k;        // (I, D); none where there is no indexer
    Weight index_weights;  // (J, D)
    Norm index_norm;       // of the key, a LayerNorm
    Vector index_norm_bias;
    int64_t J;
    int64_t index_interleaved;

    int64_t C() const { return kv_b.layout.I; }
    int64_t X() const { return C() + R; }
    int64_t I() const { return index_k.layout.O; }
    bool has_query_latent() const { return q_a.layout.O > 0; }
    bool has_indexer() const { return I() > 0; }
};

struct Router {
    Weight weight;                    // (E, D); none in a dense layer
    Vector bias;                      // (E), added for selection only
    int64_t K;                        // experts of a token
    int64_t G, topk_group;            // groups, and how many of them are selected
    int64_t experts_per_group_score;  // a group's score is the sum of its 1 or 2 best experts
    int64_t softmax;                  // scores are a softmax over the experts; else a sigmoid of each
    int64_t normalise;                // weights of the chosen experts add up to 1
    double scaling;

    int64_t E() const { return weight.layout.O; }
};

struct FeedForward {
    Norm norm;
    Norm output_norm;       // of a mixture's output, before it is added; without a weight there is none
    Weight gate, up, down;  // every token's: the dense network or the shared experts
    Router router;
    Layout expert_in;       // routed experts' gate and up (F, D)
    Layout expert_out;      // routed experts' down (D, F)
    const Matrix* experts;  // E gates, then E ups, then E downs
    const uint8_t* states;  // (E) of type ExpertState; null where all experts are in memory for good
};

struct Layer {
    Attention attention;
    FeedForward feed_forward;
};

// Tokens start ... stop - 1 of the batch: consecutive tokens of one sequence, the first at `first_position`. `slots`:
// for each position of the sequence up to the last token's, its slot in the flattened KV blocks.
struct PrefillChunk {
    int64_t start, stop, first_position;
    const int64_t* slots;
};

// The routers' decisions, one layer with a router after another: see soli.model.router.Routing.
struct Routings {
    int64_t* ids;     // (T, K)
    float* weights;   // (T, K)
    float* scores;    // (T, E)
    float* biased;    // (T, E)
    uint8_t* groups;  // (T, G): 1 for a selected group
    uint8_t* states;  // null; or (E): the ExpertState of each chosen expert when the layer needed it
    int64_t* waited;  // null; or nanoseconds that the layer waited for experts are added to it
};

// How a forward pass stops and continues where a layer's experts are not in memory. It stops after the layer's routing.
// Then it computes some of the experts, `begin` ... `end` - 1, and adds them to the residual stream; with the last of
// them, `end` = E, it goes on to the layers after.
struct Paging {
    int64_t layer;  // in: where to continue, -1 to start; out: where the pass stopped, -1 at its end
    int64_t begin, end;
    int64_t pass, threads;     // which pass of this thread is to continue, and the number of its threads
    int64_t* predicted;        // null, or (T, K): out, where it stopped, experts that the next layer may choose
    int64_t predicted_tokens;  // out: how many rows of `predicted` are written, 0 where the next layer has no router
};

struct ForwardArgs {
    int64_t isa, dtype, threads;
    int64_t T, D;
    int64_t layer_count;
    const Layer* layers;
    void* const* kv_blocks;   // for each layer (P, S, X) of dtype
    void* const* index_keys;  // for each layer (P, S, I) of dtype, or null
    int64_t block_count, block_size, blocks_per_sequence;
    int64_t num_decode_tokens, chunk_count;
    const int32_t* block_table;  // (num_decode_tokens, W)
    const int32_t* lengths;      // (num_decode_tokens) slots to attend to; the last is the token's own
    const PrefillChunk* chunks;  // the tokens after the decode tokens, in order
    const int64_t* positions;    // (T) of the rotary embedding
    const float* frequencies;    // (R / 2) radians per position
    double cos_sin_scale;
    double query_scaling;  // beta; queries are multiplied with 1 + beta log(1 + floor(position / length))
    int64_t query_scaling_length;
    Vector x;                      // (T, D) hidden states; or the embedding (vocab_size, D), and
    const int64_t* token_ids;      // (T) rows of the embedding; else null
    Norm norm;                     // after the last layer
    void* y;                       // (T, D) of dtype
    Weight head;                   // (vocab_size, D)
    const int64_t* logit_indices;  // tokens that get logits
    int64_t logit_count, vocab_size;
    float* logits;                         // (logit_count, vocab_size), rounded to dtype
    const uint8_t* const* masked_experts;  // null; or for each layer null or (T, E): 1 for an expert not to select
    Routings routings;                     // of the first layer that has a router; the others follow
    Paging* paging;                        // null where all experts are in memory
};

}  // namespace soli
