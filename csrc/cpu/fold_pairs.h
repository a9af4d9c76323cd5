// Evicted pairs join kept ones: each the one whose shares of the queries' attention are most like
// its own. Shares take two passes over the keys, as in window attention; those of a key are then a
// vector of length 1, its pattern, so that products of patterns are cosines. Whoever evicts has
// queries enough to tell pairs apart, and few enough that patterns are no larger than keys.
#pragma once

#include "../params.h"
#include "fold_layout.h"
#include "parallel.h"
#include "tile_products.h"
#include "vec.h"

namespace moekv::cpu::MOEKV_ISA {
namespace {

constexpr float kLeastShare = 1e-18f;   // its square is a normal number; what is below counts as 0
constexpr float kMostValue = 65504.0f;  // of float16: what is beyond would spread to whom it joins
constexpr int32_t kNobody = -1;

// One KV head of one batch row. Positions count from its first real key.
template <typename T>
class FoldHead {
 public:
  FoldHead(const FoldPairsParams& p, const FoldLayout& layout, int64_t row)
      : p_(p), lanes_(layout.queries) {
    const int64_t b = row / p.num_kv_heads, h = row % p.num_kv_heads;
    group_ = p.num_query_heads / p.num_kv_heads;
    start_ = p.start ? p.start[b] : 0;
    if (start_ < 0) start_ = 0;
    if (start_ > p.num_keys) start_ = p.num_keys;
    length = p.num_keys - start_;
    queries_ =
        static_cast<const T*>(p.queries) + b * p.query_stride[0] + h * group_ * p.query_stride[1];
    keys_ = static_cast<const T*>(p.keys) + b * p.key_stride[0] + h * p.key_stride[1] +
            start_ * p.key_stride[2];
    values_ = static_cast<const T*>(p.values) + b * p.value_stride[0] + h * p.value_stride[1];
    first_kept_ = p.offsets[row];
    num_kept_ = p.offsets[row + 1] - first_kept_;
    indices_ = p.indices + first_kept_;
    joined_ = p.joined + row * p.num_keys;
    char* workspace = static_cast<char*>(p.workspace);
    const auto floats = [&](size_t offset, int64_t first) {
      return reinterpret_cast<float*>(workspace + offset) + first;
    };
    const int64_t padded_dim = round_up(p.key_dim, kDimMultiple);
    packed_ = workspace + layout.packed + row * lanes_ * padded_dim * kPackedBytes;
    peak_ = floats(layout.peak, row * layout.chunks * lanes_);
    total_ = floats(layout.total, row * layout.chunks * lanes_);
    shift_ = floats(layout.shift, row * lanes_);
    patterns_ =
        reinterpret_cast<bfloat16_t*>(workspace + layout.patterns) + row * p.num_keys * lanes_;
    looks_ = floats(layout.looks, row * p.num_keys);
    weights_ = floats(layout.weights, row * p.num_keys);
    kept_ = workspace + layout.kept_of(row, first_kept_);
    sums_ = floats(layout.sums, first_kept_ * p.value_dim);
    totals_ = floats(layout.totals, first_kept_);
    constexpr float kLog2E = 1.4426950408889634f;
    to_log2_ = (p.softcap > 0 ? p.softcap : p.scaling) * kLog2E;
    to_softcap_ = p.softcap > 0 ? 2 * kLog2E * p.scaling / p.softcap : 0.0f;
  }

  int64_t length;  // real keys

  // Packs the queries, and says of every key whether it may join another: 0, or kNobody.
  void prepare() const {
    for (int64_t m = 0; m < lanes_; m += kPanel) {
      Logits::pack(
          [&](int64_t lane) {
            const int64_t query = m + lane;
            return queries_ + query / p_.num_queries * p_.query_stride[1] +
                   query % p_.num_queries * p_.query_stride[2];
          },
          num_queries() - m, p_.key_dim, packed_ + m / kPanel * Logits::panel_bytes(p_.key_dim));
    }
    for (int64_t t = 0; t < p_.num_keys; ++t) joined_[t] = t < start_ ? kNobody : 0;
    for (int64_t i = 0; i < num_kept_; ++i) joined_[indices_[i]] = kNobody;
  }

  // Largest logit (before to_log2_) and sum of 2^(to_log2_ * (logit - largest)) of every query over
  // the keys [begin, end).
  void partial_softmax(int64_t chunk, int64_t begin, int64_t end) const {
    float *peak = peak_ + chunk * lanes_, *total = total_ + chunk * lanes_;
    for (int64_t m = 0; m < lanes_; ++m) {
      peak[m] = kLeastPeak;
      total[m] = 0.0f;
    }
    const Vec scale = Vec::set(to_log2_);
    for_each_block(begin, end, [&](int64_t, int count, int64_t m, const float* logits) {
      for (int lane = 0; lane < kPanel; lane += Vec::kLanes) {
        const Vec old = Vec::load(peak + m + lane);
        Vec top = old;
        for (int i = 0; i < count; ++i) top = max(top, Vec::load(logits + i * kPanel + lane));
        Vec sum = Vec::load(total + m + lane) * exp2((old - top) * scale);
        for (int i = 0; i < count; ++i) {
          sum = sum + exp2((Vec::load(logits + i * kPanel + lane) - top) * scale);
        }
        top.store(peak + m + lane);
        sum.store(total + m + lane);
      }
    });
  }

  // Between the passes: the largest logit of every query, in the first chunk's place, and what to
  // add to to_log2_ * (logit - largest) to get log2 of a share.
  void combine_softmax(int64_t chunks) const {
    const Vec log2_e = Vec::set(1.4426950408889634f), scale = Vec::set(to_log2_);
    for (int64_t m = 0; m < lanes_; m += Vec::kLanes) {
      Vec top = Vec::set(kLeastPeak), sum = Vec::set(0.0f);
      for (int64_t c = 0; c < chunks; ++c) top = max(top, Vec::load(peak_ + c * lanes_ + m));
      for (int64_t c = 0; c < chunks; ++c) {
        const Vec factor = exp2((Vec::load(peak_ + c * lanes_ + m) - top) * scale);
        sum = fma(Vec::load(total_ + c * lanes_ + m), factor, sum);
      }
      top.store(peak_ + m);
      (Vec::set(0.0f) - log(sum) * log2_e).store(shift_ + m);
    }
    for (int64_t m = num_queries(); m < lanes_; ++m) shift_[m] = kHiddenLogit;
  }

  // Second pass: patterns and mean shares of the keys [begin, end).
  void find_patterns(int64_t begin, int64_t end) const {
    const Vec scale = Vec::set(to_log2_), least = Vec::set(kLeastShare), zero = Vec::set(0.0f);
    alignas(64) float shares[Logits::kTile * kMaxDim];
    for_each_block(begin, end, [&](int64_t tile, int count, int64_t m, const float* logits) {
      for (int lane = 0; lane < kPanel; lane += Vec::kLanes) {
        const Vec peak = Vec::load(peak_ + m + lane), shift = Vec::load(shift_ + m + lane);
        for (int i = 0; i < count; ++i) {
          const Vec logit = Vec::load(logits + i * kPanel + lane);
          const Vec share = exp2(fma(logit - peak, scale, shift));
          select(least > share, zero, share).store(shares + i * lanes_ + m + lane);
        }
      }
      if (m + kPanel < lanes_) return;
      for (int i = 0; i < count; ++i) {
        const float* row = shares + i * lanes_;
        Vec sum = zero, squares = zero;
        for (int64_t q = 0; q < lanes_; q += Vec::kLanes) {
          const Vec share = Vec::load(row + q);
          sum = sum + share;
          squares = fma(share, share, squares);
        }
        const float norm = __builtin_sqrtf(squares.sum());
        const Vec inverse = Vec::set(norm == 0.0f ? 0.0f : 1.0f / norm);
        bfloat16_t* pattern = patterns_ + (tile + i) * lanes_;
        for (int64_t q = 0; q < lanes_; q += Vec::kLanes) {
          (Vec::load(row + q) * inverse).store(pattern + q);
        }
        looks_[tile + i] = sum.sum() / static_cast<float>(num_queries());
      }
    });
  }

  void pack_kept() const {
    alignas(64) static constexpr bfloat16_t kZeros[kMaxDim] = {};
    for (int64_t k = 0; k < num_kept_; k += kPanel) {
      Cosines::pack(
          [&](int64_t lane) {  // padding looks like nothing
            const int64_t place = indices_[k + lane] - start_;
            return place < 0 ? kZeros : patterns_ + place * lanes_;
          },
          num_kept_ - k, lanes_, kept_ + k / kPanel * Cosines::panel_bytes(lanes_));
    }
  }

  // Whom the evicted keys of [begin, end) join, and with which weights.
  void find_nearest(int64_t begin, int64_t end) const {
    const float least = p_.least / static_cast<float>(length);
    [[maybe_unused]] const typename Cosines::Session session{};
    typename Cosines::Keys rows;
    // Of every lane of the panels: the largest cosine so far, and in which panel it was.
    alignas(64) float cosines[Cosines::kTile * kPanel], best[Cosines::kTile * kPanel];
    alignas(64) float panel[Cosines::kTile * kPanel];
    int64_t places[Cosines::kTile];
    for (int64_t next = begin; next < end;) {
      int count = 0;
      for (; next < end && count < Cosines::kTile; ++next) {
        int32_t& joined = joined_[start_ + next];
        if (joined == kNobody) continue;
        if (looks_[next] >= least) {
          places[count++] = next;
        } else {
          joined = kNobody;
        }
      }
      if (count == 0) break;  // the rest are kept, or hardly looked at
      Cosines::stage([&](int64_t i) { return patterns_ + places[i] * lanes_; }, count, lanes_,
                     rows);
      for (int i = 0; i < count * kPanel; i += Vec::kLanes) {
        Vec::set(p_.gate).store(best + i);
        Vec::set(-1.0f).store(panel + i);
      }
      for (int64_t k = 0; k < num_kept_; k += kPanel) {
        Cosines::multiply(rows, count, kept_ + k / kPanel * Cosines::panel_bytes(lanes_), lanes_,
                          cosines, [](int, int) {});
        const Vec number = Vec::set(static_cast<float>(k / kPanel));
        for (int i = 0; i < count * kPanel; i += Vec::kLanes) {
          const Vec cosine = Vec::load(cosines + i), old = Vec::load(best + i);
          const Mask more = cosine > old;
          select(more, cosine, old).store(best + i);
          select(more, number, Vec::load(panel + i)).store(panel + i);
        }
      }
      for (int i = 0; i < count; ++i) {
        join(places[i], nearest(best + i * kPanel, panel + i * kPanel));
      }
    }
  }

  // Sums up who joins whom, in the order of positions.
  void merge() const {
    const int64_t dim = p_.value_dim;
    for (int64_t i = 0; i < num_kept_; ++i) {
      const T* value = values_ + indices_[i] * p_.value_stride[2];
      totals_[i] = 1.0f;
      for (int64_t d = 0; d < dim; d += Vec::kLanes) {
        store_lanes(load_lanes(value + d, dim - d), sums_ + i * dim + d, dim - d);
      }
    }
    for (int64_t t = start_; t < p_.num_keys; ++t) {
      if (joined_[t] == kNobody) continue;
      const T* value = values_ + t * p_.value_stride[2];
      if (!is_storable(value)) {
        joined_[t] = kNobody;
        continue;
      }
      const int64_t i = joined_[t] - first_kept_;
      const Vec weight = Vec::set(weights_[t]);
      totals_[i] += weights_[t];
      for (int64_t d = 0; d < dim; d += Vec::kLanes) {
        float* sum = sums_ + i * dim + d;
        const Vec more = load_lanes(value + d, dim - d);
        store_lanes(fma(weight, more, load_lanes(sum, dim - d)), sum, dim - d);
      }
    }
    for (int64_t i = 0; i < num_kept_; ++i) {
      const T* value = values_ + indices_[i] * p_.value_stride[2];
      T* folded = static_cast<T*>(p_.folded) + (first_kept_ + i) * dim;
      half_t* bias = reinterpret_cast<half_t*>(p_.bias) + first_kept_ + i;
      if (totals_[i] == 1.0f) {
        std::memcpy(folded, value, static_cast<size_t>(dim) * sizeof(T));
        *bias = {0};
        continue;
      }
      const float inverse = 1.0f / totals_[i];
      for (int64_t d = 0; d < dim; ++d) folded[d] = from_float<T>(sums_[i * dim + d] * inverse);
      *bias = from_float<half_t>(__builtin_logf(totals_[i]));
    }
  }

 private:
  using Logits = TileProducts<T>;
  using Cosines = TileProducts<bfloat16_t>;

  int64_t num_queries() const { return group_ * p_.num_queries; }

  // Gives take(first key, keys, first query, logits) the products of tiles of keys [begin, end)
  // with every panel of queries, under the softcap.
  template <typename Take>
  void for_each_block(int64_t begin, int64_t end, const Take& take) const {
    [[maybe_unused]] const typename Logits::Session session{};
    typename Logits::Keys keys;
    alignas(64) float logits[Logits::kTile * kPanel];
    for (int64_t tile = begin; tile < end; tile += Logits::kTile) {
      const int count = static_cast<int>(end - tile < Logits::kTile ? end - tile : Logits::kTile);
      Logits::stage([&](int64_t i) { return keys_ + (tile + i) * p_.key_stride[2]; }, count,
                    p_.key_dim, keys);
      for (int64_t m = 0; m < lanes_; m += kPanel) {
        Logits::multiply(keys, count, packed_ + m / kPanel * Logits::panel_bytes(p_.key_dim),
                         p_.key_dim, logits, [](int, int) {});
        if (to_softcap_ > 0) {
          const Vec one = Vec::set(1.0f), two = Vec::set(2.0f), factor = Vec::set(to_softcap_);
          for (int i = 0; i < count * kPanel; i += Vec::kLanes) {  // tanh
            (one - two / (one + exp2(Vec::load(logits + i) * factor))).store(logits + i);
          }
        }
        take(tile, count, m, logits);
      }
    }
  }

  // The first of the kept keys with the largest cosine, or kNobody.
  static int64_t nearest(const float* best, const float* panel) {
    float top = best[0];
    for (int lane = 1; lane < kPanel; ++lane) top = best[lane] > top ? best[lane] : top;
    int64_t found = kNobody;
    for (int lane = 0; lane < kPanel; ++lane) {
      if (best[lane] < top || panel[lane] < 0) continue;
      const int64_t kept = static_cast<int64_t>(panel[lane]) * kPanel + lane;
      if (found == kNobody || kept < found) found = kept;
    }
    return found;
  }

  void join(int64_t place, int64_t kept) const {
    int32_t& joined = joined_[start_ + place];
    joined = kNobody;
    if (kept == kNobody) return;
    const float share = looks_[place] / looks_[indices_[kept] - start_];
    const float weight = share < 1.0f ? share : 1.0f;
    if (!(weight > 0.0f)) return;
    weights_[start_ + place] = weight;
    joined = static_cast<int32_t>(first_kept_ + kept);
  }

  bool is_storable(const T* value) const {
    const Vec zero = Vec::set(0.0f), most = Vec::set(kMostValue);
    Vec sum = zero;
    uint64_t beyond = 0;
    for (int64_t d = 0; d < p_.value_dim; d += Vec::kLanes) {
      const Vec x = load_lanes(value + d, p_.value_dim - d);
      sum = fma(x, zero, sum);  // NaN after a NaN
      beyond |= bits(max(x, zero - x) > most);
    }
    return beyond == 0 && sum.sum() == 0.0f;
  }

  const FoldPairsParams& p_;
  int64_t lanes_, group_, start_, first_kept_, num_kept_;
  const T *queries_, *keys_, *values_;  // values from the first position on, padding included
  const int32_t* indices_;
  int32_t* joined_;
  char *packed_, *kept_;
  float *peak_, *total_, *shift_, *looks_, *weights_, *sums_, *totals_;
  bfloat16_t* patterns_;
  float to_log2_, to_softcap_;
};

template <typename T>
inline void fold_pairs_typed(const FoldPairsParams& p) {
  const FoldLayout layout = fold_layout(p);
  const auto each_row = [&](const auto& work) {
    parallel_for(0, layout.rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) work(FoldHead<T>(p, layout, row));
    });
  };
  const auto each_chunk = [&](const auto& work) {
    parallel_for(0, layout.rows * layout.chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const FoldHead<T> head(p, layout, item / layout.chunks);
        const int64_t chunk = item % layout.chunks, first = chunk * kChunkKeys;
        const int64_t last = first + kChunkKeys < head.length ? first + kChunkKeys : head.length;
        work(head, chunk, first, last);
      }
    });
  };
  each_row([](const FoldHead<T>& head) { head.prepare(); });
  each_chunk([](const FoldHead<T>& head, int64_t chunk, int64_t first, int64_t last) {
    head.partial_softmax(chunk, first, last);
  });
  each_row([&](const FoldHead<T>& head) { head.combine_softmax(layout.chunks); });
  each_chunk([](const FoldHead<T>& head, int64_t, int64_t first, int64_t last) {
    head.find_patterns(first, last);
  });
  each_row([](const FoldHead<T>& head) { head.pack_kept(); });
  each_chunk([](const FoldHead<T>& head, int64_t, int64_t first, int64_t last) {
    head.find_nearest(first, last);
  });
  each_row([](const FoldHead<T>& head) { head.merge(); });
}

inline void fold_pairs_kernel(const FoldPairsParams& p) {
  switch (p.dtype) {
    case DType::kFloat:
      return fold_pairs_typed<float>(p);
    case DType::kHalf:
      return fold_pairs_typed<half_t>(p);
    case DType::kBFloat16:
      return fold_pairs_typed<bfloat16_t>(p);
  }
}

}  // namespace
}  // namespace moekv::cpu::MOEKV_ISA
