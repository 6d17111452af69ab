// Size and field hash of each struct that Python fills in, so that structs.py cannot differ from forward_args.h
// unnoticed.
#include <cstddef>

#include "forward_args.h"

namespace soli {
namespace {

// As CStructLayout of structs.py.
struct StructLayout {
    const char* name;
    int64_t size;
    uint64_t field_hash;
};

struct Field {
    const char* name;
    uint64_t offset, size;
};

constexpr uint64_t fnv1a(uint64_t hash, uint64_t byte) { return (hash ^ byte) * 0x100000001b3; }

constexpr uint64_t fnv1a_number(uint64_t hash, uint64_t number) {
    for (int i = 0; i < 8; i++) hash = fnv1a(hash, number >> 8 * i & 255);
    return hash;
}

// 64-bit FNV-1a over name, offset and size (little-endian, 8 bytes each) of each field.
template <size_t COUNT>
constexpr uint64_t field_hash(const Field (&fields)[COUNT]) {
    uint64_t hash = 0xcbf29ce484222325;
    for (const Field& field : fields) {
        for (const char* c = field.name; *c; c++) hash = fnv1a(hash, static_cast<unsigned char>(*c));
        hash = fnv1a_number(hash, field.offset);
        hash = fnv1a_number(hash, field.size);
    }
    return hash;
}

// Fields have 8 bytes or a multiple, so a struct has no padding: a field missing below leaves bytes over.
template <size_t COUNT>
constexpr uint64_t total_size(const Field (&fields)[COUNT]) {
    uint64_t size = 0;
    for (const Field& field : fields) size += field.size;
    return size;
}

template <class S>
constexpr StructLayout layout_of();

#define FIELD(NAME) \
    Field { #NAME, offsetof(S, NAME), sizeof(S::NAME) }

#define STRUCT(NAME, ...)                                                                          \
    template <>                                                                                    \
    constexpr StructLayout layout_of<NAME>() {                                                     \
        using S = NAME;                                                                            \
        constexpr Field fields[] = {__VA_ARGS__};                                                  \
        static_assert(total_size(fields) == sizeof(S), "a field of " #NAME " is not listed here"); \
        return {#NAME, sizeof(S), field_hash(fields)};                                             \
    }

STRUCT(Matrix, FIELD(weight), FIELD(scale))
STRUCT(Layout, FIELD(format), FIELD(O), FIELD(I), FIELD(group))
STRUCT(Vector, FIELD(data), FIELD(dtype))
STRUCT(Norm, FIELD(weight), FIELD(eps))
STRUCT(Weight, FIELD(matrix), FIELD(layout))
STRUCT(Attention, FIELD(norm), FIELD(q_norm), FIELD(kv_norm), FIELD(q_a), FIELD(q_b), FIELD(kv_a), FIELD(kv_b),
       FIELD(o), FIELD(q_a_bias), FIELD(kv_a_bias), FIELD(o_bias), FIELD(H), FIELD(N), FIELD(R), FIELD(V),
       FIELD(interleaved), FIELD(scale), FIELD(topk), FIELD(index_q), FIELD(index_k), FIELD(index_weights),
       FIELD(index_norm), FIELD(index_norm_bias), FIELD(J), FIELD(index_interleaved))
STRUCT(Router, FIELD(weight), FIELD(bias), FIELD(K), FIELD(G), FIELD(topk_group), FIELD(experts_per_group_score),
       FIELD(softmax), FIELD(normalise), FIELD(scaling))
STRUCT(FeedForward, FIELD(norm), FIELD(output_norm), FIELD(gate), FIELD(up), FIELD(down), FIELD(router),
       FIELD(expert_in), FIELD(expert_out), FIELD(experts), FIELD(states))
STRUCT(Layer, FIELD(attention), FIELD(feed_forward))
STRUCT(PrefillChunk, FIELD(start), FIELD(stop), FIELD(first_position), FIELD(slots))
STRUCT(Routings, FIELD(ids), FIELD(weights), FIELD(scores), FIELD(biased), FIELD(groups), FIELD(states), FIELD(waited))
STRUCT(Paging, FIELD(layer), FIELD(begin), FIELD(end), FIELD(pass), FIELD(threads), FIELD(predicted),
       FIELD(predicted_tokens))
STRUCT(ForwardArgs, FIELD(isa), FIELD(dtype), FIELD(threads), FIELD(T), FIELD(D), FIELD(layer_count), FIELD(layers),
       FIELD(kv_blocks), FIELD(index_keys), FIELD(block_count), FIELD(block_size), FIELD(blocks_per_sequence),
       FIELD(num_decode_tokens), FIELD(chunk_count), FIELD(block_table), FIELD(lengths), FIELD(chunks),
       FIELD(positions), FIELD(frequencies), FIELD(cos_sin_scale), FIELD(query_scaling), FIELD(query_scaling_length),
       FIELD(x), FIELD(token_ids), FIELD(norm), FIELD(y), FIELD(head), FIELD(logit_indices), FIELD(logit_count),
       FIELD(vocab_size), FIELD(logits), FIELD(masked_experts), FIELD(routings), FIELD(paging))

constexpr StructLayout STRUCT_LAYOUTS[] = {
    layout_of<Matrix>(),      layout_of<Layout>(),       layout_of<Vector>(),   layout_of<Norm>(),
    layout_of<Weight>(),      layout_of<Attention>(),    layout_of<Router>(),   layout_of<FeedForward>(),
    layout_of<Layer>(),       layout_of<PrefillChunk>(), layout_of<Routings>(), layout_of<Paging>(),
    layout_of<ForwardArgs>(),
};

}  // namespace

// The layouts of all structs; `count` receives how many.
extern "C" const StructLayout* soli_struct_layouts(int64_t* count) {
    *count = sizeof STRUCT_LAYOUTS / sizeof STRUCT_LAYOUTS[0];
    return STRUCT_LAYOUTS;
}

}  // namespace soli
