// The attention that pairs can expect: what the query of each token pays to the pair of its own
// token and to the kReach behind it, in a softmax whose sum a sample of all keys stands for.
//
// Queries come in tiles, one query head after another. Lanes run over the sampled keys, which are
// packed once per head; of 16 queries at a time the maxima and sums are then taken across lanes,
// and lanes run over these queries for the few keys near them. A query's largest logit is
// subtracted before logits are scaled to powers of 2: the largest keeps the weight 1, whatever its
// size.
#pragma once

#include "../params.h"
#include "../sample_places.h"
#include "expert_scores_layout.h"
#include "parallel.h"
#include "tile_products.h"
#include "vec.h"

namespace moekv::cpu::MOEKV_ISA {
namespace {

// Pairs per unit of work, counted from the first real one of a row: a left-padded row is computed
// as it would be alone. With the queries before them that look at them: whole tiles.
constexpr int64_t kChunkPairs = 256 - kReach;
constexpr int kGroup = 16;  // queries whose sums are taken together

// Square of an attention that nothing looks at; its root is a normal number.
constexpr float kLeastSquare = 1e-36f;

// Keys of a row; those behind its end are the last one.
template <typename T>
struct NearKeys {
  const T* keys;
  int64_t stride, length, dim;

  const T* operator()(int64_t place) const {
    return keys + (place < length ? place : length - 1) * stride;
  }
};

// Products of a tile of queries with the keys near them: to the place of query i belong the keys
// first + i ... first + i + kReach. Dot products, which are few. Writes band[step][query] for
// `count` queries, rounded up to kGroup.
template <typename T, int kTile>
class Band {
 public:
  void stage(const NearKeys<T>& keys, int64_t first, int) {
    keys_ = keys;
    first_ = first;
  }

  template <typename RowOf, typename Staged>
  void multiply(const RowOf& query, const Staged&, int count,
                float (&band)[kReach + 1][kTile]) const {
    constexpr int kPairLanes = 2 * Vec::kLanes;
    for (int begin = 0; begin < count; begin += kGroup) {
      Vec sums[kReach + 1][kGroup];
      for (int i = 0; i < kGroup; ++i) {
        Vec sum[kReach + 1][2];
        for (auto& s : sum) s[0] = s[1] = Vec::set(0.0f);
        for (int64_t d = 0; begin + i < count && d < keys_.dim; d += kPairLanes) {
          const VecPair q = load_pair(query(begin + i) + d, keys_.dim - d);
          for (int step = 0; step <= kReach; ++step) {
            const VecPair k = load_pair(keys_(first_ + begin + i + step) + d, keys_.dim - d);
            sum[step][0] = fma(q.a, k.a, sum[step][0]);
            sum[step][1] = fma(q.b, k.b, sum[step][1]);
          }
        }
        for (int step = 0; step <= kReach; ++step) sums[step][i] = sum[step][0] + sum[step][1];
      }
      for (int step = 0; step <= kReach; ++step) sum16(sums[step], band[step] + begin);
    }
  }

 private:
  NearKeys<T> keys_;
  int64_t first_;
};

#ifdef __AMX_BF16__
// On tiles: 16 queries with 32 keys, of which kReach + 1 belong to each. The keys are packed once
// for all heads of the group.
template <int kTile>
class Band<bfloat16_t, kTile> {
 public:
  void stage(const NearKeys<bfloat16_t>& keys, int64_t first, int count) {
    dim_ = keys.dim;
    for (int block = 0; block * 16 < count + 16; ++block) {
      char* tile = tiles_ + block * Products::steps(dim_) * kTileBytes;
      for (int64_t d = 0; d < dim_; d += Products::kStep, tile += kTileBytes) {
        Vec rows[16];
        for (int i = 0; i < 16; ++i) {
          const bfloat16_t* key = keys(first + block * 16 + i) + d;
          bfloat16_t numbers[Products::kStep] = {};
          if (dim_ - d < Products::kStep) {
            std::memcpy(numbers, key, (dim_ - d) * sizeof *key);
            key = numbers;
          }
          std::memcpy(&rows[i], key, sizeof rows[i]);
        }
        transpose(rows);  // pairs of channels
        std::memcpy(tile, rows, sizeof rows);
      }
    }
  }

  template <typename RowOf>
  void multiply(const RowOf&, const typename AmxProducts<bfloat16_t>::Keys& queries, int count,
                float (&band)[kReach + 1][kTile]) const {
    alignas(64) float products[kTile][32];
    const int64_t steps = Products::steps(dim_), stride = steps * Products::kStep;
    order_tile_loads();
    for (int begin = 0; begin < count; begin += 16) {
      const bfloat16_t* query = queries.rows[0] + begin * stride;
      const char* key = tiles_ + begin / 16 * steps * kTileBytes;
      _tile_zero(0);
      _tile_zero(1);
      for (int64_t step = 0; step < steps; ++step, key += kTileBytes) {
        _tile_loadd(4, query + step * Products::kStep, stride * 2);
        _tile_loadd(6, key, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, key + steps * kTileBytes, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      _tile_stored(0, products[begin], 128);
      _tile_stored(1, products[begin] + 16, 128);
    }
    order_tile_loads();
    for (int begin = 0; begin < count; begin += 16) {
      __m512 diagonal[kReach + 1] = {};
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        for (int step = 0; step <= kReach; ++step) {
          diagonal[step] = _mm512_mask_loadu_ps(diagonal[step], static_cast<__mmask16>(1u << i),
                                                products[begin + i] + step);
        }
      }
      for (int step = 0; step <= kReach; ++step) {
        _mm512_storeu_ps(band[step] + begin, diagonal[step]);
      }
    }
  }

 private:
  using Products = AmxProducts<bfloat16_t>;
  static constexpr int64_t kTileBytes = 1024;

  // [16 keys][step][pair of channels][key][2]
  alignas(64) char tiles_[(kTile / 16 + 1) * (kMaxDim / Products::kStep) * kTileBytes];
  int64_t dim_;
};
#endif

// Rotates the first `turned` channels of a row, whose halves are the coordinates.
template <typename T>
inline void rotate(const T* row, const float* cos, const float* sin, int64_t turned, int64_t dim,
                   T* rotated) {
  const int64_t half = turned / 2;
  constexpr int kTwo = 2 * Vec::kLanes;
  int64_t d = 0;
  for (; d + kTwo <= half; d += kTwo) {
    Vec first[2], second[2];
    for (int i = 0; i < 2; ++i) {
      const int64_t at = d + i * Vec::kLanes;
      const Vec x = Vec::load(row + at), y = Vec::load(row + half + at);
      first[i] = x * Vec::load(cos + at) - y * Vec::load(sin + at);
      second[i] = fma(y, Vec::load(cos + half + at), x * Vec::load(sin + half + at));
    }
    store_two(first[0], first[1], rotated + d);
    store_two(second[0], second[1], rotated + half + d);
  }
  for (; d < half; d += Vec::kLanes) {
    const int64_t left = half - d;
    const Vec x = load_lanes(row + d, left), y = load_lanes(row + half + d, left);
    const auto of = [&](const float* turn, int64_t begin) {
      return load_lanes(turn + begin + d, left);
    };
    store_lanes(x * of(cos, 0) - y * of(sin, 0), rotated + d, left);
    store_lanes(fma(y, of(cos, half), x * of(sin, half)), rotated + half + d, left);
  }
  if (turned < dim) std::memcpy(rotated + turned, row + turned, (dim - turned) * sizeof(T));
}

template <typename Products, typename T>
class ExpectedAttention {
 public:
  explicit ExpectedAttention(const ExpectedAttentionParams& params) : p(params) {
    constexpr float kLog2E = 1.4426950408889634f;
    to_log2_ = (p.softcap > 0 ? p.softcap : p.scaling) * kLog2E;
    to_softcap_ = p.softcap > 0 ? 2 * kLog2E * p.scaling / p.softcap : 0.0f;
  }

  void run() const {
    const int64_t rows = p.batch * p.num_kv_heads;
    const int64_t chunks = (p.num_keys + kChunkPairs - 1) / kChunkPairs;
    parallel_for(0, rows, 4, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) begin_row(Row(p, row));
    });
    parallel_for(0, rows * chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t unit = first; unit < last; ++unit) {
        const Row row(p, unit / chunks);
        const int64_t begin = unit % chunks * kChunkPairs, left = row.length - begin;
        if (left > 0) score(row, begin, begin + (left < kChunkPairs ? left : kChunkPairs));
      }
    });
  }

 private:
  // As few queries as make whole blocks of products and whole groups: their logits stay in L1.
  static constexpr int kTile = Products::kBlock % kGroup == 0 ? Products::kBlock : Products::kTile;
  static constexpr int kPanels = kPlaces / kPanel;
  static constexpr int kVecs = kPlaces / Vec::kLanes;

  // One KV head of one batch row; positions count from the first real one.
  struct Row {
    const T *queries, *keys;
    const float *cos, *sin;  // or null
    float* scores;
    int64_t number, length, group, start;

    Row(const ExpectedAttentionParams& p, int64_t row) : number(row) {
      const int64_t b = row / p.num_kv_heads, h = row % p.num_kv_heads;
      start = p.start ? p.start[b] : 0;
      if (start < 0) start = 0;
      if (start > p.num_keys) start = p.num_keys;
      length = p.num_keys - start;
      group = p.num_query_heads / p.num_kv_heads;
      queries = static_cast<const T*>(p.queries) + b * p.query_stride[0] +
                h * group * p.query_stride[1] + start * p.query_stride[2];
      keys = static_cast<const T*>(p.keys) + b * p.key_stride[0] + h * p.key_stride[1] +
             start * p.key_stride[2];
      const int64_t turn = b * p.turn_stride + start * p.turned;
      cos = p.cos ? p.cos + turn : nullptr;
      sin = p.sin ? p.sin + turn : nullptr;
      scores = p.scores + row * p.num_keys + start;
    }
  };

  // Logits of a tile of queries of one head, before to_log2_.
  struct Block {
    int64_t tile = 0;                           // the first query
    int count = 0;                              // queries
    float* sampled;                             // [panel][query][key of the panel]
    alignas(64) float band[kReach + 1][kTile];  // of the key at the query's place, and behind it

    float* panel(int panel) const { return sampled + panel * kTile * kPanel; }
  };

  // Squares of the attention that queries pay, summed over the heads of the group.
  struct Squares {
    alignas(64) float sums[kReach + 1][kChunkPairs + kReach + kTile];
    int64_t first;  // query
  };

  const T* key(const Row& row, int64_t place) const { return row.keys + place * p.key_stride[2]; }
  char* packed(const Row& row) const {
    return static_cast<char*>(p.workspace) +
           row.number * kPlaces * round_up(p.head_dim, kDimMultiple) * kPackedBytes;
  }

  void begin_row(const Row& row) const {
    for (int64_t i = 1; i <= row.start; ++i) row.scores[-i] = 0.0f;
    if (row.length == 0) return;
    for (int panel = 0; panel < kPanels; ++panel) {
      Products::pack(
          [&](int64_t i) {
            return key(row, sample_place(static_cast<int>(panel * kPanel + i), row.length));
          },
          kPanel, p.head_dim, packed(row) + panel * Products::panel_bytes(p.head_dim));
    }
  }

  // The pairs [begin, end). The exponentials of one tile are interleaved with the products of the
  // next: they keep different units of the processor busy.
  void score(const Row& row, int64_t begin, int64_t end) const {
    [[maybe_unused]] const typename Products::Session session{};
    typename Products::Keys staged;
    // Not a multiple of 4 KiB apart, or loads from one would wait for stores to the other.
    alignas(64) float logits[2][kTile * kPlaces + 512];
    alignas(64) T rotated[kTile * kMaxDim];
    alignas(64) float weights[kPlaces];
    for (int i = 0; i < kPlaces; ++i) weights[i] = sample_weight(i, row.length);
    Squares squares{{}, begin - kReach};
    Block blocks[2];
    blocks[0].sampled = logits[0];
    blocks[1].sampled = logits[1];
    Softmax softmax{this, &row, weights, &squares, {}, {}};
    Band<T, kTile> band;
    int now = 0;
    for (int64_t tile = begin < kReach ? 0 : begin - kReach; tile < end; tile += kTile) {
      const int count = static_cast<int>(end - tile < kTile ? end - tile : kTile);
      band.stage({row.keys, p.key_stride[2], row.length, p.head_dim}, tile, count);
      for (int64_t head = 0; head < row.group; ++head) {
        Block& next = blocks[now];
        const Block& done = blocks[1 - now];
        next.tile = tile;
        next.count = count;
        const T* queries = row.queries + head * p.query_stride[1] + tile * p.query_stride[2];
        const T* own = queries;
        int64_t stride = p.query_stride[2];
        if (row.cos) {
          for (int64_t i = 0; i < count; ++i) {
            const int64_t turn = (tile + i) * p.turned;
            rotate(queries + i * p.query_stride[2], row.cos + turn, row.sin + turn, p.turned,
                   p.head_dim, rotated + i * p.head_dim);
          }
          own = rotated;
          stride = p.head_dim;
        }
        const auto query = [own, stride](int64_t i) { return own + i * stride; };
        Products::stage(query, next.count, p.head_dim, staged);
        const bool last = head + 1 == row.group;
        const T* ahead =
            last ? row.queries + (tile + kTile) * p.query_stride[2] : queries + p.query_stride[1];
        const int64_t left = row.length - (last ? tile + kTile : tile);
        for (int panel = 0; panel < kPanels; ++panel) {
          const auto work = [&](int from, int to) {
            from = part(panel, from), to = part(panel, to);
            for (int i = from; i < to && i < left; ++i) prefetch(ahead + i * p.query_stride[2]);
            const int rows = groups(done) * kGroup;
            softmax.rows(done, from < rows ? from : rows, to < rows ? to : rows);
          };
          Products::multiply(staged, next.count,
                             packed(row) + panel * Products::panel_bytes(p.head_dim), p.head_dim,
                             next.panel(panel), work);
        }
        if (row.length > kPlaces) {
          band.multiply(query, staged, next.count, next.band);
        } else {
          take_band(next);
        }
        if (to_softcap_ > 0) softcap(next);
        hide_what_is_not_there(row, next);
        now = 1 - now;
      }
    }
    softmax.rows(blocks[1 - now], 0, groups(blocks[1 - now]) * kGroup);
    for (int64_t pair = begin; pair < end; pair += Vec::kLanes) {
      Vec sum = Vec::set(0.0f);
      for (int step = 0; step <= kReach; ++step) {
        sum = sum + Vec::load(squares.sums[step] + (pair - step - squares.first));
      }
      const Vec mean = sum * Vec::set(1.0f / static_cast<float>(row.group));
      // max(constant, x) is x where x is NaN.
      const Vec log_root = Vec::set(0.5f) * log(max(Vec::set(kLeastSquare), mean));
      store_lanes(log_root, row.scores + pair, end - pair);
    }
  }

  // Of a row that is its own sample: the same products as in the softmax's sum, to the bit.
  static void take_band(Block& block) {
    for (int step = 0; step <= kReach; ++step) {
      for (int i = 0; i < groups(block) * kGroup; ++i) {
        const int64_t place = block.tile + i + step;
        const bool there = i < block.count && place < kPlaces;
        block.band[step][i] =
            there ? block.panel(static_cast<int>(place / kPanel))[i * kPanel + place % kPanel] : 0;
      }
    }
  }

  static int groups(const Block& block) { return (block.count + kGroup - 1) / kGroup; }

  // How many queries of a tile are to be done when `rows` of Products::kTile of a panel are.
  static int part(int panel, int rows) {
    const int done = panel * Products::kTile + (rows < Products::kTile ? rows : Products::kTile);
    return done * kTile / (kPanels * Products::kTile);
  }

  void prefetch(const T* row) const {
    const char* bytes = reinterpret_cast<const char*>(row);
    for (size_t byte = 0; byte < p.head_dim * sizeof(T); byte += 64) {
      __builtin_prefetch(bytes + byte, 0, 2);  // to L2
    }
  }

  // tanh(s / softcap)
  void softcap(Block& block) const {
    const Vec one = Vec::set(1.0f), two = Vec::set(2.0f), factor = Vec::set(to_softcap_);
    const auto cap = [&](float* logits, int count) {
      for (int i = 0; i < count; i += Vec::kLanes) {
        (one - two / (one + exp2(Vec::load(logits + i) * factor))).store(logits + i);
      }
    };
    for (int panel = 0; panel < kPanels; ++panel) cap(block.panel(panel), block.count * kPanel);
    for (auto& logits : block.band) cap(logits, groups(block) * kGroup);
  }

  void hide_what_is_not_there(const Row& row, Block& block) const {
    for (int step = 1; step <= kReach; ++step) {
      int64_t i = row.length - step - block.tile;
      for (i = i < 0 ? 0 : i; i < block.count; ++i) block.band[step][i] = kHiddenLogit;
    }
  }

  // What becomes of a block. rows() may come in any number of pieces.
  struct Softmax {
    const ExpectedAttention* self;
    const Row* row;
    const float* weights;
    Squares* squares;
    alignas(64) float peaks[kGroup];  // the highest logit of each query
    Vec sums[kGroup];

    void rows(const Block& block, int from, int to) {
      const Vec scale = Vec::set(self->to_log2_);
      for (int i = from; i < to; ++i) {
        const int lane = i % kGroup;
        if (lane == 0) begin(block, i);
        const Vec peak = Vec::set(peaks[lane]);
        Vec sum = Vec::set(0.0f);
        for (int v = 0; v < kVecs; ++v) {
          const Vec logit = Vec::load(logits(block, i, v));
          sum = fma(exp2((logit - peak) * scale), Vec::load(weights + v * Vec::kLanes), sum);
        }
        sums[lane] = sum;
        if (lane == kGroup - 1) end(block, i - lane);
      }
    }

    static const float* logits(const Block& block, int i, int vec) {
      return block.panel(vec / 2) + i * kPanel + vec % 2 * Vec::kLanes;
    }

    void begin(const Block& block, int first) {
      Vec top[kGroup];
      for (int i = 0; i < kGroup; ++i) {
        top[i] = Vec::load(logits(block, first + i, 0));
        for (int v = 1; v < kVecs; ++v)
          top[i] = max(top[i], Vec::load(logits(block, first + i, v)));
      }
      highest16(top, peaks);
      for (int i = 0; i < kGroup; i += Vec::kLanes) {
        Vec highest = Vec::load(peaks + i);
        for (const auto& band : block.band) highest = max(highest, Vec::load(band + first + i));
        highest.store(peaks + i);
      }
    }

    void end(const Block& block, int first) {
      float totals[kGroup];
      sum16(sums, totals);
      for (int i = 0; i < kGroup; i += Vec::kLanes) {
        const Vec scale = Vec::set(self->to_log2_), peak = Vec::load(peaks + i);
        Vec total = Vec::load(totals + i), near[kReach + 1];
        for (int step = 0; step <= kReach; ++step) {
          near[step] = exp2((Vec::load(block.band[step] + first + i) - peak) * scale);
        }
        if (row->length > kPlaces) {  // the sample may have missed just those
          for (const Vec& one : near) total = total + one;
        }
        const Vec inverse = Vec::set(1.0f) / total;
        for (int step = 0; step <= kReach; ++step) {
          const Vec share = near[step] * inverse;
          float* sum = squares->sums[step] + (block.tile + first + i - squares->first);
          fma(share, share, Vec::load(sum)).store(sum);
        }
      }
    }
  };

  const ExpectedAttentionParams& p;
  float to_log2_, to_softcap_;
};

inline void expected_attention_kernel(const ExpectedAttentionParams& params) {
  switch (params.dtype) {
    case DType::kFloat:
      return ExpectedAttention<TileProducts<float>, float>(params).run();
    case DType::kHalf:
      return ExpectedAttention<TileProducts<half_t>, half_t>(params).run();
    case DType::kBFloat16:
      return ExpectedAttention<TileProducts<bfloat16_t>, bfloat16_t>(params).run();
  }
}

}  // namespace
}  // namespace moekv::cpu::MOEKV_ISA
