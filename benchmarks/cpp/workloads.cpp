#include "workloads.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>

#include "../../csrc/backend.h"

#ifndef MOEKV_CUDA
namespace moekv::bench {

void* allocate(size_t bytes) {
  void* memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (!memory) throw std::bad_alloc();
  return memory;
}
void release(void* memory) { std::free(memory); }

}  // namespace moekv::bench
#endif

namespace moekv::bench {
namespace {

constexpr int64_t kHeads = 8, kQueryHeads = 32, kDim = 128, kWindow = 64;

// Zeroed memory, aligned as torch's, and kept for as long as a workload needs it.
class Memory {
 public:
  template <typename T>
  T* take(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T) + 64;
    void* memory = allocate(bytes);
    std::memset(memory, 0, bytes);
    owned_->emplace_back(memory, release);
    return static_cast<T*>(memory);
  }

  // Numbers in [-2, 2), the same in every run.
  float* floats(int64_t count) {
    float* numbers = take<float>(count);
    for (int64_t i = 0; i < count; ++i) numbers[i] = random();
    return numbers;
  }
  uint16_t* bfloats(int64_t count) {
    uint16_t* numbers = take<uint16_t>(count);
    for (int64_t i = 0; i < count; ++i) {
      const float number = random();
      std::memcpy(numbers + i, reinterpret_cast<const char*>(&number) + 2, 2);
    }
    return numbers;
  }

  // What a workload captures to keep its memory.
  std::shared_ptr<void> owner() const { return owned_; }

 private:
  float random() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<float>(state_ >> 40) * (4.0f / (1 << 24)) - 2.0f;
  }

  uint64_t state_ = 1;
  using Owned = std::vector<std::unique_ptr<void, decltype(&release)>>;
  std::shared_ptr<Owned> owned_ = std::make_shared<Owned>();
};

template <typename Params>
Workload make(std::string name, int64_t moved, void (*Kernels::*kernel)(const Params&),
              const Params& params, const Memory& memory, std::vector<Output> outputs) {
  return {std::move(name), moved,
          [=, keep = memory.owner()](const Kernels& kernels) { (kernels.*kernel)(params); },
          std::move(outputs)};
}

Output numbers(float* data, int64_t count) { return {data, count, Output::Kind::kFloat}; }
Output rounded(void* data, int64_t count) { return {data, count, Output::Kind::kBFloat16}; }
Output codes(void* data, int64_t count) { return {data, count, Output::Kind::kCodes}; }
template <typename T>
Output exact(T* data, int64_t count) {
  return {data, count * static_cast<int64_t>(sizeof(T)), Output::Kind::kExact};
}

void set_strides(int64_t (&stride)[3], int64_t heads, int64_t positions, int64_t dim) {
  stride[0] = heads * positions * dim;
  stride[1] = positions * dim;
  stride[2] = dim;
}

Workload gating_topk(int64_t num_tokens, int64_t num_experts) {
  constexpr int64_t k = 2;
  Memory memory;
  GatingTopkParams p{};
  p.logits = memory.bfloats(num_tokens * num_experts);
  p.weights = memory.take<float>(num_tokens * k);
  p.experts = memory.take<int32_t>(num_tokens * k);
  p.prob_sum = memory.take<float>(num_experts);
  p.load = memory.take<int64_t>(num_experts);
  p.entropy = memory.take<float>(1);
  p.num_tokens = num_tokens;
  p.num_experts = num_experts;
  p.k = k;
  p.logits_stride = num_experts;
  p.inv_temperature = 1;
  p.dtype = DType::kBFloat16;
  p.workspace = memory.take<char>(MOEKV_BACKEND::gating_topk_workspace_bytes(p));
  return make(
      "gating_topk, " + std::to_string(num_experts) + " experts",
      num_tokens * (2 * num_experts + 8 * k), &Kernels::gating_topk, p, memory,
      {numbers(p.weights, num_tokens * k), exact(p.experts, num_tokens * k),
       numbers(p.prob_sum, num_experts), exact(p.load, num_experts), numbers(p.entropy, 1)});
}

Workload project_tokens(int64_t num_tokens) {
  constexpr int64_t hidden = kQueryHeads * kDim, num_projections = 5;
  Memory memory;
  ProjectTokensParams p{};
  p.hidden_states = memory.bfloats(num_tokens * hidden);
  p.weight = memory.bfloats(num_projections * hidden);
  p.projected = memory.take<float>(num_tokens * num_projections);
  p.standout = memory.take<float>(num_tokens);
  p.batch = 1;
  p.num_tokens = num_tokens;
  p.num_channels = hidden;
  p.num_projections = num_projections;
  p.stride[0] = num_tokens * hidden;
  p.stride[1] = p.weight_stride = hidden;
  p.dtype = DType::kBFloat16;
  p.workspace = memory.take<char>(MOEKV_BACKEND::project_tokens_workspace_bytes(p));
  const int64_t moved = num_tokens * (2 * 2 * hidden + 4 * (num_projections + 1));
  return make(
      "project_tokens", moved, &Kernels::project_tokens, p, memory,
      {numbers(p.projected, num_tokens * num_projections), numbers(p.standout, num_tokens)});
}

Workload expert_scores(const char* name, int64_t num_keys, std::initializer_list<ScoreKind> kinds) {
  Memory memory;
  const int64_t pairs = kHeads * num_keys;
  ExpertScoresParams p{};
  p.keys = memory.bfloats(pairs * kDim);
  p.values = memory.bfloats(pairs * kDim);
  p.queries = memory.bfloats(kQueryHeads * kWindow * kDim);
  for (const ScoreKind kind : kinds) p.scores[static_cast<int>(kind)] = memory.take<float>(pairs);
  p.batch = 1;
  p.num_kv_heads = kHeads;
  p.num_query_heads = kQueryHeads;
  p.num_keys = num_keys;
  p.num_queries = kWindow;
  p.key_dim = p.value_dim = kDim;
  set_strides(p.key_stride, kHeads, num_keys, kDim);
  set_strides(p.value_stride, kHeads, num_keys, kDim);
  set_strides(p.query_stride, kQueryHeads, kWindow, kDim);
  p.pool = 5;
  p.lag = 128;
  p.scaling = 0.08838834764f;
  p.dtype = DType::kBFloat16;
  p.workspace = memory.take<char>(MOEKV_BACKEND::expert_scores_workspace_bytes(p));
  const int64_t kv_reads = kinds.size() > 1 ? 3 : 2;
  std::vector<Output> outputs;
  for (const ScoreKind kind : kinds) {
    outputs.push_back(numbers(p.scores[static_cast<int>(kind)], pairs));
  }
  const auto written = static_cast<int64_t>(outputs.size());
  return make(name, pairs * (kv_reads * 2 * kDim + 4 * written), &Kernels::expert_scores, p, memory,
              outputs);
}

Workload expected_attention(int64_t num_keys) {
  constexpr int64_t hidden = kQueryHeads * kDim;
  Memory memory;
  ExpectedAttentionParams p{};
  p.queries = memory.bfloats(num_keys * hidden);  // as projected: heads side by side
  p.keys = memory.bfloats(kHeads * num_keys * kDim);
  p.scores = memory.take<float>(kHeads * num_keys);
  p.batch = 1;
  p.num_kv_heads = kHeads;
  p.num_query_heads = kQueryHeads;
  p.num_keys = num_keys;
  p.head_dim = kDim;
  p.query_stride[0] = num_keys * hidden;
  p.query_stride[1] = kDim;
  p.query_stride[2] = hidden;
  set_strides(p.key_stride, kHeads, num_keys, kDim);
  p.scaling = 0.08838834764f;
  p.dtype = DType::kBFloat16;
  p.workspace = memory.take<char>(MOEKV_BACKEND::expected_attention_workspace_bytes(p));
  const int64_t moved = num_keys * (2 * (hidden + kHeads * kDim) + 4 * kHeads);
  return make("expected_attention", moved, &Kernels::expected_attention, p, memory,
              {numbers(p.scores, kHeads * num_keys)});
}

Workload mix_scores(int64_t num_keys) {
  constexpr int64_t num_experts = 4, k = 2;
  Memory memory;
  const int64_t pairs = kHeads * num_keys;
  MixScoresParams p{};
  p.scores = memory.floats(num_experts * pairs);
  p.weights = memory.floats(num_keys * k);
  int32_t* experts = memory.take<int32_t>(num_keys * k);
  for (int64_t i = 0; i < num_keys * k; ++i) experts[i] = static_cast<int32_t>(i * 5 / 3 % 4);
  p.experts = experts;
  p.gain = memory.floats(num_experts * kHeads);
  p.offset = memory.floats(num_experts * kHeads);
  p.mixed = memory.take<float>(pairs);
  p.num_experts = num_experts;
  p.batch = 1;
  p.num_kv_heads = kHeads;
  p.num_keys = num_keys;
  p.k = k;
  set_strides(p.score_stride, 1, kHeads, num_keys);
  set_strides(p.weight_stride, 0, 0, k);
  p.weight_stride[0] = num_keys * k;
  std::memcpy(p.expert_stride, p.weight_stride, sizeof p.expert_stride);
  return make("mix_scores", 4 * pairs * (num_experts + 1) + 8 * num_keys * k, &Kernels::mix_scores,
              p, memory, {numbers(p.mixed, pairs)});
}

// Half of the pairs: of every head by itself, or of all heads together.
Workload select_kept(const char* name, int64_t num_keys, int64_t rows) {
  Memory memory;
  const int64_t groups = kHeads / rows, total = rows * (num_keys / 2);
  SelectKeptParams p{};
  p.scores = memory.floats(kHeads * num_keys);
  int64_t* totals = memory.take<int64_t>(groups);
  for (int64_t g = 0; g < groups; ++g) totals[g] = total;
  p.total = totals;
  p.indices = memory.take<int32_t>(groups * total);
  p.offsets = memory.take<int32_t>(kHeads + 1);
  p.groups = groups;
  p.rows = rows;
  p.num_keys = num_keys;
  p.score_stride[0] = rows * num_keys;
  p.score_stride[1] = num_keys;
  p.sinks = 4;
  p.window = 16;
  p.floor = 1;
  p.dtype = DType::kFloat;
  p.workspace = memory.take<char>(MOEKV_BACKEND::select_kept_workspace_bytes(p));
  return make(name, 4 * (kHeads * num_keys + groups * total), &Kernels::select_kept, p, memory,
              {exact(p.indices, groups * total), exact(p.offsets, kHeads + 1)});
}

Workload kv_compact(int64_t num_keys) {
  Memory memory;
  const int64_t pairs = kHeads * num_keys, kept = num_keys / 2;
  KvCompactParams p{};
  p.keys = memory.bfloats(pairs * kDim);
  p.values = memory.bfloats(pairs * kDim);
  // One of each two neighbours, so that runs of kept pairs have one or two.
  int32_t* indices = memory.take<int32_t>(kHeads * kept);
  const float* coin = memory.floats(kHeads * kept);
  for (int64_t i = 0; i < kHeads * kept; ++i) {
    indices[i] = static_cast<int32_t>(2 * (i % kept) + (coin[i] > 0));
  }
  p.indices = indices;
  p.batch = 1;
  p.num_kv_heads = kHeads;
  p.num_keys = num_keys;
  p.num_kept = kept;
  p.num_indices = kHeads * kept;
  p.key_bytes = p.value_bytes = 2 * kDim;
  set_strides(p.key_stride, kHeads, num_keys, 2 * kDim);
  set_strides(p.value_stride, kHeads, num_keys, 2 * kDim);
  p.workspace = memory.take<char>(MOEKV_BACKEND::kv_compact_workspace_bytes(p));
  return make("kv_compact", kHeads * kept * (2 * 2 * 2 * kDim + 4), &Kernels::kv_compact, p, memory,
              {exact(static_cast<uint16_t*>(p.keys), pairs * kDim),
               exact(static_cast<uint16_t*>(p.values), pairs * kDim)});
}

Workload quantize_pairs(const std::string& name, int64_t num_keys, int key_bits, int value_bits) {
  Memory memory;
  const int64_t pairs = kHeads * num_keys;
  const int64_t key_bytes = code_bytes(kDim, key_bits), value_bytes = code_bytes(kDim, value_bits);
  const int64_t scales = code_scales(kDim, key_bits) + code_scales(kDim, value_bits);
  QuantizePairsParams p{};
  p.keys = memory.bfloats(pairs * kDim);
  p.values = memory.bfloats(pairs * kDim);
  p.key_codes = memory.take<uint8_t>(pairs * key_bytes);
  p.value_codes = memory.take<uint8_t>(pairs * value_bytes);
  p.scales = memory.take<uint16_t>(pairs * scales);
  p.num_pairs = pairs;
  p.key_dim = p.value_dim = kDim;
  p.key_stride = p.value_stride = kDim;
  p.key_bits = key_bits;
  p.value_bits = value_bits;
  p.dtype = DType::kBFloat16;
  return make(name, pairs * (2 * 2 * kDim + key_bytes + value_bytes + 2 * scales),
              &Kernels::quantize_pairs, p, memory,
              {codes(p.key_codes, pairs * key_bytes), codes(p.value_codes, pairs * value_bytes),
               codes(p.scales, 2 * pairs * scales)});
}

#ifndef MOEKV_CUDA
Output halves(uint16_t* data, int64_t count) { return {data, count, Output::Kind::kHalf}; }

// A quarter of the pairs stays.
Workload fold_pairs(int64_t num_keys) {
  Memory memory;
  const int64_t pairs = kHeads * num_keys, queries = kMaxFoldQueries / (kQueryHeads / kHeads);
  FoldPairsParams p{};
  p.queries = memory.bfloats(kQueryHeads * queries * kDim);
  p.keys = memory.bfloats(pairs * kDim);
  p.values = memory.bfloats(pairs * kDim);
  int32_t* indices = memory.take<int32_t>(pairs / 4);
  int32_t* offsets = memory.take<int32_t>(kHeads + 1);
  for (int64_t i = 0; i < pairs / 4; ++i) indices[i] = static_cast<int32_t>(4 * i % num_keys);
  for (int64_t h = 0; h <= kHeads; ++h) offsets[h] = static_cast<int32_t>(h * num_keys / 4);
  p.indices = indices;
  p.offsets = offsets;
  p.folded = memory.take<uint16_t>(pairs / 4 * kDim);
  p.bias = memory.take<uint16_t>(pairs / 4);
  p.joined = memory.take<int32_t>(pairs);
  p.batch = 1;
  p.num_kv_heads = kHeads;
  p.num_query_heads = kQueryHeads;
  p.num_queries = queries;
  p.num_keys = num_keys;
  p.num_kept = pairs / 4;
  p.key_dim = p.value_dim = kDim;
  set_strides(p.query_stride, kQueryHeads, queries, kDim);
  set_strides(p.key_stride, kHeads, num_keys, kDim);
  set_strides(p.value_stride, kHeads, num_keys, kDim);
  p.scaling = 0.08838834764f;
  p.dtype = DType::kBFloat16;
  p.workspace = memory.take<char>(MOEKV_BACKEND::fold_pairs_workspace_bytes(p));
  return make("fold_pairs", 2 * (2 * pairs * kDim + kQueryHeads * queries * kDim),
              &Kernels::fold_pairs, p, memory,
              {rounded(p.folded, pairs / 4 * kDim), halves(p.bias, pairs / 4)});
}
#endif

// Stored rows in bf16, or in codes that are anything, with scales of about 1 / 128.
Workload ragged_attention(const std::string& name, int64_t num_keys, int key_bits, int value_bits) {
  Memory memory;
  const int64_t pairs = kHeads * num_keys;
  RaggedAttentionParams p{};
  p.query = memory.bfloats(kQueryHeads * kDim);
  p.key_bits = key_bits;
  p.value_bits = value_bits;
  int64_t row_bytes = 2 * 2 * kDim;
  if (key_bits == 16) {
    p.keys = memory.bfloats(pairs * kDim);
    p.values = memory.bfloats(pairs * kDim);
    p.key_stride = p.value_stride = kDim;
  } else {
    // Bytes of numbers, which is what codes look like.
    p.key_stride = code_bytes(kDim, key_bits);
    p.value_stride = code_bytes(kDim, value_bits);
    p.scale_stride = code_scales(kDim, key_bits) + code_scales(kDim, value_bits);
    p.keys = memory.bfloats(pairs * p.key_stride / 2);
    p.values = memory.bfloats(pairs * p.value_stride / 2);
    uint16_t* scales = memory.take<uint16_t>(pairs * p.scale_stride);
    for (int64_t i = 0; i < pairs * p.scale_stride; ++i) scales[i] = 0x2000;
    p.scales = scales;
    row_bytes = p.key_stride + p.value_stride + 2 * p.scale_stride;
  }
  int32_t* begin = memory.take<int32_t>(kHeads);
  int32_t* end = memory.take<int32_t>(kHeads);
  for (int64_t h = 0; h < kHeads; ++h) {
    begin[h] = static_cast<int32_t>(h * num_keys);
    end[h] = static_cast<int32_t>((h + 1) * num_keys);
  }
  p.begin = begin;
  p.end = end;
  p.output = memory.take<uint16_t>(kQueryHeads * kDim);
  p.batch = 1;
  p.num_kv_heads = kHeads;
  p.num_query_heads = kQueryHeads;
  p.num_queries = 1;
  p.key_dim = p.value_dim = kDim;
  p.num_stored = pairs;
  set_strides(p.query_stride, kQueryHeads, 1, kDim);
  p.scaling = 0.08838834764f;
  p.dtype = DType::kBFloat16;
  p.workspace = memory.take<char>(MOEKV_BACKEND::ragged_attention_workspace_bytes(p));
  return make(name, pairs * row_bytes, &Kernels::ragged_attention, p, memory,
              {rounded(p.output, kQueryHeads * kDim)});
}

}  // namespace

std::vector<Workload> workloads(int64_t num_keys) {
  return {
      gating_topk(num_keys, 8),
      gating_topk(num_keys, 128),
      project_tokens(num_keys),
      expert_scores("expert_scores, window attention", num_keys, {ScoreKind::kAttention}),
      expert_scores(
          "expert_scores, all kinds", num_keys,
          {ScoreKind::kMass, ScoreKind::kAttention, ScoreKind::kDiversity, ScoreKind::kLag}),
      expected_attention(num_keys),
      mix_scores(num_keys),
      select_kept("select_kept, per head", num_keys, 1),
      select_kept("select_kept, over heads", num_keys, kHeads),
      kv_compact(num_keys),
      ragged_attention("ragged_attention", num_keys, 16, 16),
      quantize_pairs("quantize_pairs, k8v8", num_keys, 8, 8),
      quantize_pairs("quantize_pairs, k4v4", num_keys, 4, 4),
#ifndef MOEKV_CUDA
      fold_pairs(num_keys),
#endif
      ragged_attention("ragged_attention, k8v8", num_keys, 8, 8),
      ragged_attention("ragged_attention, k8v4", num_keys, 8, 4),
      ragged_attention("ragged_attention, k4v4", num_keys, 4, 4),
  };
}

}  // namespace moekv::bench
