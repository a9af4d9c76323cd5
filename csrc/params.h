// Plain parameter structs: the whole interface between the ops (which know torch) and the kernels
// (which do not). Pointers, sizes and strides only; strides count elements.
#pragma once

#include <cstdint>

namespace moekv {

enum class DType : int8_t { kFloat, kHalf, kBFloat16 };

constexpr int kMaxExperts = 256;
constexpr int kMaxHeadDim = 256;

struct GatingTopkParams {
  const void* logits;       // [num_tokens, num_experts], dtype
  const float* bias;        // [num_experts] or null
  const bool* mask;         // [num_tokens] or null, true: a real token
  const float* importance;  // [num_tokens] or null: slot j counts clamp(k * importance - j, 0, 1)
  float* weights;           // [num_tokens, k]
  int32_t* experts;         // [num_tokens, k]
  float* prob_sum;          // [num_experts]
  int64_t* load;            // [num_experts]
  float* entropy;           // one number
  void* workspace;          // gating_topk_workspace_bytes()
  int64_t num_tokens, num_experts, k;
  int64_t logits_stride;  // of a token; experts are dense
  float inv_temperature;
  DType dtype;
};

enum class ScoreKind : int8_t { kMass = 0, kAttention = 1, kDiversity = 2, kLag = 3 };
constexpr int kNumScoreKinds = 4;

struct ExpertScoresParams {
  const void* keys;               // [B, H, T, D], dtype
  const void* values;             // [B, H, T, Dv], dtype
  const void* queries;            // [B, Hq, W, D], dtype; the last W positions
  const int32_t* start;           // [B] or null
  float* scores[kNumScoreKinds];  // [B, H, T] per kind, null where not asked for
  void* workspace;                // expert_scores_workspace_bytes()
  int64_t batch, num_kv_heads, num_query_heads, num_keys, num_queries, key_dim, value_dim;
  int64_t key_stride[3], value_stride[3], query_stride[3];  // batch, head, position; dim is dense
  int64_t pool, lag;
  float scaling, softcap;
  DType dtype;
};

struct ProjectTokensParams {
  const void* hidden_states;  // [B, T, C], dtype
  const void* weight;         // [P, C], dtype
  const bool* mask;           // [B, T] or null, true: a real token
  float* projected;           // [B, T, P]
  float* standout;            // [B, T]
  void* workspace;            // project_tokens_workspace_bytes()
  int64_t batch, num_tokens, num_channels, num_projections;
  int64_t stride[2];      // batch, token; channels are dense
  int64_t weight_stride;  // of a projection; channels are dense
  DType dtype;
};

struct ExpectedAttentionParams {
  const void* queries;   // [B, Hq, T, D], dtype
  const void* keys;      // [B, H, T, D], dtype
  const int32_t* start;  // [B] or null
  float* scores;         // [B, H, T]
  void* workspace;       // expected_attention_workspace_bytes()
  int64_t batch, num_kv_heads, num_query_heads, num_keys, head_dim;
  int64_t query_stride[3], key_stride[3];  // batch, head, position; dim is dense
  float scaling, softcap;
  DType dtype;
  const float *cos, *sin;  // [B or 1, T, turned], by which queries are rotated first, or null
  int64_t turn_stride;     // between the rows of a batch; 0: they share the rotation
  int64_t turned;          // channels, the first ones
};

struct MixScoresParams {
  const float* scores;     // [E, B, H, T]
  const float* weights;    // [B, H or 1, T, k]
  const int32_t* experts;  // like weights
  const float* gain;       // [E, B, H] or null
  const float* offset;     // [E, B, H] or null
  float* mixed;            // [B, H, T]
  int64_t num_experts, batch, num_kv_heads, num_keys, k;
  int64_t score_stride[3];   // expert, batch, head; positions are dense
  int64_t weight_stride[3];  // batch, head (0: shared by the heads), position; k is dense
  int64_t expert_stride[3];
};

struct SelectKeptParams {
  const void* scores;    // [groups, rows, T], dtype
  const int32_t* start;  // [groups, rows] or null
  const int64_t* total;  // [groups], on the host
  int32_t* indices;      // [sum(total)]
  int32_t* offsets;      // [groups * rows + 1]
  void* workspace;       // select_kept_workspace_bytes()
  int64_t groups, rows, num_keys;
  int64_t score_stride[2];  // group, row; positions are dense
  int64_t sinks, window, floor;
  DType dtype;
};

struct KvCompactParams {
  void* keys;                                       // [rows, T, D]
  void* values;                                     // [rows, T, Dv]
  const int32_t* indices;                           // flat, or [rows, n]
  const int32_t* offsets;                           // [rows + 1], or null: every row has n indices
  void* workspace;                                  // kv_compact_workspace_bytes()
  int64_t batch, num_kv_heads, num_keys, num_kept;  // num_kept: n, if offsets is null
  int64_t num_indices;                              // of all rows together
  int64_t key_bytes, value_bytes;                   // of one position of one head
  int64_t key_stride[3], value_stride[3];           // batch, head, position, in bytes
  bool packed;
};

// How a stored pair is quantised. 8 bits: int8 codes, times one scale a row. 4 bits: the row mixed
// by blocks of its dim's largest power of two (sums and differences, divided by their number);
// groups of kCodeGroup channels, or what is left, are lo + step * code, a byte holding a channel of
// the group's first half in its low bits and the one as far into the second half in its high bits.
// A pair's scales are fp16: those of its key, then its value; one for 8 bits, {lo, step} a group
// for 4.
constexpr int kCodeGroup = 32;
constexpr int64_t kMaxCodeDim = 1024;

inline constexpr int64_t code_bytes(int64_t dim, int bits) { return dim * bits / 8; }
inline constexpr int64_t code_scales(int64_t dim, int bits) {
  return bits == 8 ? 1 : (dim + kCodeGroup - 1) / kCodeGroup * 2;
}

struct QuantizePairsParams {
  const void* keys;      // [num_pairs, D], dtype
  const void* values;    // [num_pairs, Dv], dtype
  uint8_t* key_codes;    // [num_pairs, code_bytes(D, key_bits)]
  uint8_t* value_codes;  // [num_pairs, code_bytes(Dv, value_bits)]
  uint16_t* scales;      // [num_pairs, the scales of both], fp16
  int64_t num_pairs, key_dim, value_dim;
  int64_t key_stride, value_stride;  // of a pair; channels are dense
  int key_bits, value_bits;          // 8 or 4
  DType dtype;
};

constexpr int64_t kMaxFoldQueries = 256;  // of a KV head

struct FoldPairsParams {
  const void* queries;     // [B, Hq, M, D], dtype; as they would ask behind the last key
  const void* keys;        // [B, H, T, D], dtype
  const void* values;      // [B, H, T, Dv], dtype
  const int32_t* indices;  // [num_kept], positions, ascending in each row
  const int32_t* offsets;  // [B * H + 1]
  const int32_t* start;    // [B] or null, clamped to [0, T]
  void* folded;            // [num_kept, Dv], dtype, dense
  uint16_t* bias;          // [num_kept], fp16
  int32_t* joined;         // [B, H, T]: which of the kept pairs an evicted one joined, or -1
  void* workspace;         // fold_pairs_workspace_bytes()
  int64_t batch, num_kv_heads, num_query_heads, num_queries, num_keys, num_kept, key_dim, value_dim;
  int64_t query_stride[3], key_stride[3], value_stride[3];  // batch, head, position; dim is dense
  float scaling, softcap, gate, least;
  DType dtype;
};

struct RaggedAttentionParams {
  const void* query;        // [B, Hq, Q, D], dtype; the last Q positions
  const void* keys;         // [num_stored, D], dtype, or codes
  const void* values;       // [num_stored, Dv], dtype, or codes
  const uint16_t* scales;   // [num_stored, the scales of both], fp16, or null
  const uint16_t* bias;     // [num_stored] fp16 or null, added to logits; -inf hides a row
  const float* sinks;       // [Hq] or null: logits of a key without a value
  const int32_t* begin;     // [B, H] first stored row of a head
  const int32_t* end;       // [B, H] one past its last
  const void* tail_keys;    // [B, H, S, D] or null
  const void* tail_values;  // [B, H, S, Dv] or null
  const bool* mask;         // [B, Hq, Q, S] or null; true: the query sees the tail position
  void* output;             // [B, Q, Hq, Dv], dtype, dense
  void* workspace;          // ragged_attention_workspace_bytes()
  int64_t batch, num_kv_heads, num_query_heads, num_queries, key_dim, value_dim;
  int64_t num_stored, num_tail;
  int64_t query_stride[3], key_stride, value_stride;  // batch, head, position; dim is dense
  int64_t scale_stride;                               // of a pair; its scales are dense
  int64_t tail_key_stride[3], tail_value_stride[3];
  int64_t mask_stride[4];  // batch, head, query, position; 0 where broadcast
  float scaling, softcap;
  int key_bits, value_bits;  // of the stored rows: 16, those of dtype, or 8 or 4
  DType dtype;
};

// What a backend, or one instruction set of it, computes the ops with.
struct Kernels {
  void (*gating_topk)(const GatingTopkParams&);
  void (*expert_scores)(const ExpertScoresParams&);
  void (*expected_attention)(const ExpectedAttentionParams&);
  void (*project_tokens)(const ProjectTokensParams&);
  void (*mix_scores)(const MixScoresParams&);
  void (*select_kept)(const SelectKeptParams&);
  void (*kv_compact)(const KvCompactParams&);
  void (*quantize_pairs)(const QuantizePairsParams&);
  void (*fold_pairs)(const FoldPairsParams&);
  void (*ragged_attention)(const RaggedAttentionParams&);
};

}  // namespace moekv
