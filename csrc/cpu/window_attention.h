// MASS and ATTENTION: the attention that the window's queries pay to each key, without a [W, T]
// matrix. Two passes over tiles of keys: the softmax's denominator of every query, then the sum of
// probabilities of every key. All logits are in units of log2.
#pragma once

#include "head_view.h"
#include "tile_products.h"
#include "vec.h"

namespace moekv::cpu::MOEKV_ISA {
namespace {

// Below every logit, and the logit of a key that the query cannot see yet: finite, so that no
// difference of two of them is NaN.
constexpr float kLeastPeak = -1e30f, kHiddenLogit = -3e38f;

template <typename Products, typename T>
class WindowAttention {
 public:
  WindowAttention(const ExpertScoresParams& p, const HeadView<T>& head, char* packed)
      : head_(head), packed_(packed), panel_bytes_(Products::panel_bytes(p.key_dim)) {
    constexpr float kLog2E = 1.4426950408889634f;
    to_log2_ = (p.softcap > 0 ? p.softcap : p.scaling) * kLog2E;
    to_softcap_ = p.softcap > 0 ? 2 * kLog2E * p.scaling / p.softcap : 0.0f;
  }

  void pack_queries() const {
    for (int64_t m = 0; m < head_.query_rows(); m += kPanel) {
      Products::pack(head_, m, packed_ + m / kPanel * panel_bytes_);
    }
  }

  // First pass: largest logit (times to_log2_) and sum of 2^(logit - largest), both over the keys
  // [begin, end), of every query.
  void partial_softmax(int64_t begin, int64_t end, float* peak, float* total) const {
    for (int64_t m = 0; m < panels() * kPanel; ++m) {
      peak[m] = kLeastPeak;
      total[m] = 0.0f;
    }
    const Vec scale = Vec::set(to_log2_), zero = Vec::set(0.0f);
    for_each_panel(
        begin, end,
        [&](int64_t, int count, int64_t m, const float* logits) {
          Vec top[2] = {Vec::set(kHiddenLogit), Vec::set(kHiddenLogit)};
          for (int i = 0; i < count; ++i) {
            top[0] = max(top[0], Vec::load(logits + i * kPanel));
            top[1] = max(top[1], Vec::load(logits + i * kPanel + Vec::kLanes));
          }
          Vec sum[2], shift[2];
          for (int half = 0; half < 2; ++half) {
            const int64_t at = m + half * Vec::kLanes;
            const Vec old = Vec::load(peak + at);
            const Vec now = max(old, top[half] * scale);
            now.store(peak + at);
            sum[half] = Vec::load(total + at) * exp2(old - now);
            shift[half] = zero - now;
          }
          for (int i = 0; i < count; ++i) {
            const float* logit = logits + i * kPanel;
            sum[0] = sum[0] + exp2(fma(Vec::load(logit), scale, shift[0]));
            sum[1] = sum[1] + exp2(fma(Vec::load(logit + Vec::kLanes), scale, shift[1]));
          }
          for (int half = 0; half < 2; ++half) sum[half].store(total + m + half * Vec::kLanes);
        },
        [](int64_t, int) {});
  }

  // Between the passes: what to add to a query's logits to get log2 of its share of MASS.
  void combine_softmax(int64_t chunks, int64_t stride, const float* peak, const float* total,
                       float* shift) const {
    const Vec log2_e = Vec::set(1.4426950408889634f);
    const Vec share = log(Vec::set(1.0f / static_cast<float>(head_.query_rows()))) * log2_e;
    for (int64_t m = 0; m < panels() * kPanel; m += Vec::kLanes) {
      Vec top = Vec::set(kLeastPeak), sum = Vec::set(0.0f);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        top = max(top, Vec::load(peak + chunk * stride + m));
      }
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const Vec factor = exp2(Vec::load(peak + chunk * stride + m) - top);
        sum = fma(Vec::load(total + chunk * stride + m), factor, sum);
      }
      (share - (top + log(sum) * log2_e)).store(shift + m);
    }
    for (int64_t m = head_.query_rows(); m < panels() * kPanel; ++m) shift[m] = kHiddenLogit;
  }

  // Second pass: MASS of the keys [begin, end).
  void column_sums(int64_t begin, int64_t end, const float* shift) const {
    const Vec scale = Vec::set(to_log2_);
    Vec sums[Products::kTile];
    for (auto& sum : sums) sum = Vec::set(0.0f);
    for_each_panel(
        begin, end,
        [&](int64_t, int count, int64_t m, const float* logits) {
          const Vec shift0 = Vec::load(shift + m), shift1 = Vec::load(shift + m + Vec::kLanes);
          for (int i = 0; i < count; ++i) {
            const float* logit = logits + i * kPanel;
            sums[i] = sums[i] + (exp2(fma(Vec::load(logit), scale, shift0)) +
                                 exp2(fma(Vec::load(logit + Vec::kLanes), scale, shift1)));
          }
        },
        [&](int64_t tile, int count) {
          for (int i = 0; i < count; i += 16) {
            float mass[16];
            sum16(sums + i, mass);
            const int valid = count - i < 16 ? count - i : 16;
            std::memcpy(head_.mass + tile + i, mass, valid * sizeof(float));
          }
          for (auto& sum : sums) sum = Vec::set(0.0f);
        });
  }

 private:
  int64_t panels() const { return (head_.query_rows() + kPanel - 1) / kPanel; }

  // panel(tile, count, m, logits) for the keys [tile, tile + count) and the queries [m, m +
  // kPanel), with their logits [key][query] before to_log2_; tile_end(tile, count) after a tile's
  // panels.
  template <typename Panel, typename TileEnd>
  void for_each_panel(int64_t begin, int64_t end, const Panel& panel,
                      const TileEnd& tile_end) const {
    [[maybe_unused]] const typename Products::Session session{};
    typename Products::Keys keys;
    alignas(64) float logits[Products::kTile * kPanel];
    for (int64_t tile = begin; tile < end; tile += Products::kTile) {
      const int count =
          static_cast<int>(end - tile < Products::kTile ? end - tile : Products::kTile);
      Products::stage(head_, tile, count, keys);
      for (int64_t m = first_seeing(tile) / kPanel * kPanel; m < head_.query_rows(); m += kPanel) {
        Products::multiply(keys, count, packed_ + m / kPanel * panel_bytes_, head_.key_dim, logits);
        if (to_softcap_ > 0) softcap(logits, count);
        hide_future(tile, count, m, logits);
        panel(tile, count, m, logits);
      }
      tile_end(tile, count);
    }
  }

  // The first row of queries that can see the key; <= 0 for keys before the window.
  int64_t first_seeing(int64_t key) const {
    const int64_t query = key - (head_.length - head_.num_queries);
    return query > 0 ? query * head_.group : 0;
  }

  // tanh(s / softcap)
  void softcap(float* logits, int count) const {
    const Vec one = Vec::set(1.0f), two = Vec::set(2.0f), factor = Vec::set(to_softcap_);
    for (int i = 0; i < count * kPanel; i += Vec::kLanes) {
      (one - two / (one + exp2(Vec::load(logits + i) * factor))).store(logits + i);
    }
  }

  void hide_future(int64_t tile, int count, int64_t m, float* logits) const {
    for (int i = count - 1; i >= 0; --i) {
      int64_t hidden = first_seeing(tile + i) - m;
      if (hidden <= 0) return;  // nor from the keys before
      if (hidden > kPanel) hidden = kPanel;
      for (int64_t lane = 0; lane < hidden; ++lane) logits[i * kPanel + lane] = kHiddenLogit;
    }
  }

  const HeadView<T>& head_;
  char* packed_;
  int64_t panel_bytes_;
  float to_log2_, to_softcap_;
};

// ATTENTION of the keys [begin, end): log of MASS per query that sees the key, averaged over the
// `pool` nearest keys.
template <typename T>
inline void log_attention(const HeadView<T>& head, int64_t pool, int64_t begin, int64_t end) {
  constexpr int kBlock = 64;
  float* out = head.score(ScoreKind::kAttention);
  const int64_t radius = pool / 2 < head.length ? pool / 2 : head.length;
  const int64_t seen_by_all = head.length - head.num_queries;  // the last such position
  for (int64_t block = begin; block < end; block += kBlock) {
    const int count = static_cast<int>(end - block < kBlock ? end - block : kBlock);
    alignas(64) float mean[kBlock] = {};
    if (block >= radius && block + kBlock + radius <= seen_by_all + 1) {
      for (int64_t offset = -radius; offset <= radius; ++offset) {
        for (int i = 0; i < kBlock; ++i) mean[i] += head.mass[block + offset + i];
      }
      for (float& m : mean) m /= static_cast<float>(2 * radius + 1);
    } else {
      for (int i = 0; i < count; ++i) {
        const int64_t at = block + i;
        const int64_t first = at > radius ? at - radius : 0;
        const int64_t last = at + radius < head.length ? at + radius : head.length - 1;
        for (int64_t j = first; j <= last; ++j) {
          const float seeing =
              static_cast<float>(j > seen_by_all ? head.length - j : head.num_queries);
          mean[i] += head.mass[j] * (static_cast<float>(head.num_queries) / seeing);
        }
        mean[i] /= static_cast<float>(last - first + 1);
      }
    }
    for (int i = 0; i < count; i += Vec::kLanes) {
      // max(constant, x) is x where x is NaN.
      store_lanes(log(max(Vec::set(1e-20f), Vec::load(mean + i))), out + block + i, count - i);
    }
  }
}

}  // namespace
}  // namespace moekv::cpu::MOEKV_ISA
