// MASS and ATTENTION: the attention that the window's queries pay to each key, without a [W, T]
// matrix. Two passes over tiles of keys: the softmax's denominator of every query, then the sum of
// probabilities of every key. Both subtract a query's largest logit before they scale to powers of
// 2, and keep it apart from the logarithm of the sum: what large logits lose by rounding is then
// the same in both, and the probabilities of a query add up to 1 whatever their size.
#pragma once

#include "head_view.h"
#include "tile_products.h"
#include "vec.h"

namespace moekv::cpu::MOEKV_ISA {
namespace {

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
      Products::pack([&](int64_t lane) { return head_.query_row(m + lane); },
                     head_.query_rows() - m, head_.key_dim, packed_ + m / kPanel * panel_bytes_);
    }
  }

  // First pass: largest logit (before to_log2_) and sum of 2^(to_log2_ * (logit - largest)), both
  // over the keys [begin, end), of every query.
  void partial_softmax(int64_t begin, int64_t end, float* peak, float* total) const {
    for (int64_t m = 0; m < panels() * kPanel; ++m) {
      peak[m] = kLeastPeak;
      total[m] = 0.0f;
    }
    const bool want_values = head_.score(ScoreKind::kLag) != nullptr;
    for_each_panel(begin, end, want_values, Denominators{peak, total, Vec::set(to_log2_), {}, {}});
  }

  // Between the passes: the largest logit of every query, in the first chunk's place, and what to
  // add to to_log2_ * (logit - largest) to get log2 of its share of MASS.
  void combine_softmax(int64_t chunks, int64_t stride, float* peak, const float* total,
                       float* shift) const {
    const Vec log2_e = Vec::set(1.4426950408889634f), scale = Vec::set(to_log2_);
    const Vec share = log(Vec::set(1.0f / static_cast<float>(head_.query_rows()))) * log2_e;
    for (int64_t m = 0; m < panels() * kPanel; m += Vec::kLanes) {
      Vec top = Vec::set(kLeastPeak), sum = Vec::set(0.0f);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        top = max(top, Vec::load(peak + chunk * stride + m));
      }
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const Vec factor = exp2((Vec::load(peak + chunk * stride + m) - top) * scale);
        sum = fma(Vec::load(total + chunk * stride + m), factor, sum);
      }
      top.store(peak + m);
      (share - log(sum) * log2_e).store(shift + m);
    }
    for (int64_t m = head_.query_rows(); m < panels() * kPanel; ++m) shift[m] = kHiddenLogit;
  }

  // Second pass: MASS of the keys [begin, end).
  void column_sums(int64_t begin, int64_t end, const float* peak, const float* shift) const {
    ColumnSums sums{head_.mass, peak, shift, Vec::set(to_log2_), {}, {}, {}};
    for (auto& sum : sums.sums) sum = Vec::set(0.0f);
    for_each_panel(begin, end, false, sums);
  }

 private:
  // Products of a tile with a panel on their way to the softmax.
  struct Block {
    int64_t tile = 0, m = 0;  // the first key, the first query
    int count = 0;            // keys
    bool last = false;        // of the tile's panels
    float* logits;            // [key][query], before to_log2_
  };

  // What becomes of a block. rows() may come in any number of pieces.
  struct Denominators {
    float *peak, *total;
    Vec scale, top_of[2], sum[2];

    void begin(const Block& block) {
      Vec top[4][2];
      for (auto& t : top) t[0] = t[1] = Vec::set(kHiddenLogit);
      const auto raise = [&](int i, Vec* t) {
        t[0] = max(t[0], Vec::load(block.logits + i * kPanel));
        t[1] = max(t[1], Vec::load(block.logits + i * kPanel + Vec::kLanes));
      };
      int i = 0;
      for (; i + 4 <= block.count; i += 4) {
        for (int j = 0; j < 4; ++j) raise(i + j, top[j]);
      }
      for (; i < block.count; ++i) raise(i, top[0]);
      for (int half = 0; half < 2; ++half) {
        const int64_t at = block.m + half * Vec::kLanes;
        const Vec highest = max(max(top[0][half], top[1][half]), max(top[2][half], top[3][half]));
        const Vec old = Vec::load(peak + at);
        const Vec now = max(old, highest);
        now.store(peak + at);
        sum[half] = Vec::load(total + at) * exp2((old - now) * scale);
        top_of[half] = now;
      }
    }
    void rows(const Block& block, int from, int to) {
      for (int i = from; i < to; ++i) {
        const float* logit = block.logits + i * kPanel;
        sum[0] = sum[0] + exp2((Vec::load(logit) - top_of[0]) * scale);
        sum[1] = sum[1] + exp2((Vec::load(logit + Vec::kLanes) - top_of[1]) * scale);
      }
    }
    void end(const Block& block) {
      sum[0].store(total + block.m);
      sum[1].store(total + block.m + Vec::kLanes);
    }
  };

  struct ColumnSums {
    float* mass;
    const float *peaks, *shifts;
    Vec scale, peak[2], shift[2], sums[Products::kTile];

    void begin(const Block& block) {
      peak[0] = Vec::load(peaks + block.m);
      peak[1] = Vec::load(peaks + block.m + Vec::kLanes);
      shift[0] = Vec::load(shifts + block.m);
      shift[1] = Vec::load(shifts + block.m + Vec::kLanes);
    }
    void rows(const Block& block, int from, int to) {
      for (int i = from; i < to; ++i) {
        const float* logit = block.logits + i * kPanel;
        const Vec low = Vec::load(logit) - peak[0];
        const Vec high = Vec::load(logit + Vec::kLanes) - peak[1];
        sums[i] = sums[i] + (exp2(fma(low, scale, shift[0])) + exp2(fma(high, scale, shift[1])));
      }
    }
    void end(const Block& block) {
      if (!block.last) return;
      for (int i = 0; i < block.count; i += 16) {
        float sum[16];
        sum16(sums + i, sum);
        const int valid = block.count - i < 16 ? block.count - i : 16;
        std::memcpy(mass + block.tile + i, sum, valid * sizeof(float));
      }
      for (auto& sum : sums) sum = Vec::set(0.0f);
    }
  };

  int64_t panels() const { return (head_.query_rows() + kPanel - 1) / kPanel; }

  // Gives every block of keys [begin, end) to the softmax, in order. The exponentials of one block
  // are interleaved with the products of the next: they keep different units of the processor busy.
  template <typename Softmax>
  void for_each_panel(int64_t begin, int64_t end, bool want_values, Softmax softmax) const {
    [[maybe_unused]] const typename Products::Session session{};
    typename Products::Keys keys;
    // Not a multiple of 4 KiB apart, or loads from one would wait for stores to the other.
    alignas(64) float logits[2][Products::kTile * kPanel + 512];
    Block done{.logits = logits[0]}, next{.logits = logits[1]};
    const auto work = [&](int from, int to) {
      // The panels together ask for the tile after the next one's, and for the values that LAG will
      // want: there is nothing to wait for here, and much there.
      const int64_t ahead = next.tile + Products::kTile, part = next.m / kPanel * Products::kTile;
      const int64_t first = ahead + (part + from) / panels(), last = ahead + (part + to) / panels();
      head_.prefetch_keys(first, last);
      if (want_values) head_.prefetch_values(first, last);
      if (from == 0) {
        if (to_softcap_ > 0) softcap(done);
        hide_future(done);
        softmax.begin(done);
      }
      softmax.rows(done, from < done.count ? from : done.count, to < done.count ? to : done.count);
    };
    for (int64_t tile = begin; tile < end; tile += Products::kTile) {
      const int count =
          static_cast<int>(end - tile < Products::kTile ? end - tile : Products::kTile);
      Products::stage([&](int64_t i) { return head_.keys + (tile + i) * head_.key_stride; }, count,
                      head_.key_dim, keys);
      for (int64_t m = first_seeing(tile) / kPanel * kPanel; m < head_.query_rows(); m += kPanel) {
        const char* panel = packed_ + m / kPanel * panel_bytes_;
        next.tile = tile;
        next.m = m;
        next.count = count;
        next.last = m + kPanel >= head_.query_rows();
        Products::multiply(keys, count, panel, head_.key_dim, next.logits, work);
        if (done.count > 0) softmax.end(done);
        const Block swap = done;
        done = next;
        next = swap;
      }
    }
    work(0, Products::kTile);
    softmax.end(done);
  }

  // The first row of queries that can see the key; <= 0 for keys before the window.
  int64_t first_seeing(int64_t key) const {
    const int64_t query = key - (head_.length - head_.num_queries);
    return query > 0 ? query * head_.group : 0;
  }

  // tanh(s / softcap)
  void softcap(const Block& block) const {
    const Vec one = Vec::set(1.0f), two = Vec::set(2.0f), factor = Vec::set(to_softcap_);
    for (int i = 0; i < block.count * kPanel; i += Vec::kLanes) {
      float* logits = block.logits + i;
      (one - two / (one + exp2(Vec::load(logits) * factor))).store(logits);
    }
  }

  void hide_future(const Block& block) const {
    for (int i = block.count - 1; i >= 0; --i) {
      int64_t hidden = first_seeing(block.tile + i) - block.m;
      if (hidden <= 0) return;  // nor is any key before
      if (hidden > kPanel) hidden = kPanel;
      for (int64_t lane = 0; lane < hidden; ++lane) block.logits[i * kPanel + lane] = kHiddenLogit;
    }
  }

  const HeadView<T>& head_;
  char* packed_;
  int64_t panel_bytes_;
  float to_log2_, to_softcap_;
};

// ATTENTION of the keys [begin, end): log of MASS per query that sees the key, averaged over the
// `pool` nearest keys. What is pooled is a sum from a multiple of the pool's width on and one up to
// it, which grow by a term from one key to the next: nothing is taken away again, so that the
// little that is left where much was is exact.
template <typename T>
inline void log_attention(const HeadView<T>& head, int64_t pool, int64_t begin, int64_t end) {
  float* out = head.score(ScoreKind::kAttention);
  const int64_t radius = pool / 2 < head.length ? pool / 2 : head.length;
  const int64_t width = 2 * radius + 1, seen_by_all = head.length - head.num_queries;
  const auto attention = [&](int64_t key) {
    if (key < 0 || key >= head.length) return 0.0f;
    if (key <= seen_by_all) return head.mass[key];
    return head.mass[key] *
           (static_cast<float>(head.num_queries) / static_cast<float>(head.length - key));
  };
  // Key i pools [i - radius, i + radius], in which there is one multiple of the width.
  for (int64_t middle = (begin + radius) / width * width; middle - radius < end; middle += width) {
    const int64_t first = middle - radius > begin ? middle - radius : begin;
    const int64_t last = middle + radius < end - 1 ? middle + radius : end - 1;
    float before = 0.0f, behind = 0.0f;
    int64_t key = middle;
    for (int64_t i = last; i >= first; --i) {
      while (key > i - radius) before += attention(--key);
      out[i] = before;
    }
    key = middle;
    for (int64_t i = first; i <= last; ++i) {
      while (key <= i + radius) behind += attention(key++);
      const int64_t from = i > radius ? i - radius : 0;
      const int64_t to = i + radius < head.length ? i + radius : head.length - 1;
      out[i] = (out[i] + behind) / static_cast<float>(to - from + 1);
    }
  }
  for (int64_t i = begin; i < end; i += Vec::kLanes) {
    // max(constant, x) is x where x is NaN.
    const Vec mean = load_lanes(out + i, end - i);
    store_lanes(log(max(Vec::set(1e-20f), mean)), out + i, end - i);
  }
}

}  // namespace
}  // namespace moekv::cpu::MOEKV_ISA
