// Scores of cached keys: the driver. Every (batch, KV head, chunk of keys) is one unit of work; a
// first sweep over the units gathers what the kinds need to know of whole rows, a second one
// scores.
#pragma once

#include "../params.h"
#include "expert_scores_layout.h"
#include "head_view.h"
#include "key_diversity.h"
#include "lag.h"
#include "parallel.h"
#include "tile_products.h"
#include "vec.h"
#include "window_attention.h"

namespace moekv::cpu::MOEKV_ISA {
namespace {

template <typename T>
struct ExpertScores {
  using Attention = WindowAttention<TileProducts<T>, T>;

  const ExpertScoresParams& p;
  const ExpertScoresLayout layout = expert_scores_layout(p);
  const bool mass = asked(ScoreKind::kMass), attention = asked(ScoreKind::kAttention);
  const bool diversity = asked(ScoreKind::kDiversity), lag = asked(ScoreKind::kLag);

  bool asked(ScoreKind kind) const { return p.scores[static_cast<int>(kind)] != nullptr; }

  template <typename U = float>
  U* at(size_t offset, int64_t index = 0) const {
    return reinterpret_cast<U*>(static_cast<char*>(p.workspace) + offset) + index;
  }

  HeadView<T> head(int64_t row) const {
    HeadView<T> head(p, row);
    if (!head.mass) head.mass = at(layout.mass, row * p.num_keys + head.start);
    return head;
  }

  Attention window(const HeadView<T>& head, int64_t row) const {
    char* packed = at<char>(layout.packed, row * layout.queries * layout.dim * kPackedBytes);
    return Attention(p, head, packed);
  }

  // How many items of `work` elements each are worth waking a thread for: a few tens of
  // microseconds.
  static int64_t grain(int64_t work) { return 65536 / (work + 1) + 1; }

  // function(head, row, unit, begin, end) for all chunks of real keys.
  template <typename Function>
  void for_each_unit(int64_t grain, const Function& function) const {
    parallel_for(0, layout.rows * layout.chunks, grain, [&](int64_t first, int64_t last) {
      for (int64_t unit = first; unit < last; ++unit) {
        const int64_t row = unit / layout.chunks;
        const HeadView<T> view = head(row);
        const int64_t begin = unit % layout.chunks * kChunkKeys;
        const int64_t left = view.length - begin;
        if (left <= 0) continue;
        function(view, row, unit, begin, begin + (left < kChunkKeys ? left : kChunkKeys));
      }
    });
  }

  template <typename Function>
  void for_each_row(int64_t grain, const Function& function) const {
    parallel_for(0, layout.rows, grain, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) function(head(row), row);
    });
  }

  void run() const {
    for_each_row(grain(layout.queries * layout.dim + p.num_keys),
                 [&](const HeadView<T>& head, int64_t row) {
                   head.score_padding();
                   if (mass || attention) window(head, row).pack_queries();
                 });
    for_each_unit(
        1, [&](const HeadView<T>& head, int64_t row, int64_t unit, int64_t begin, int64_t end) {
          if (mass || attention) {
            const int64_t partial = unit * layout.queries;
            window(head, row).partial_softmax(begin, end, at(layout.peak, partial),
                                              at(layout.total, partial));
          }
          if (diversity) sum_directions(head, begin, end, at(layout.anchor, unit * layout.dim));
          if (lag) lag_scores(head, p.lag, begin, end, at(layout.spread, row * p.num_keys));
        });
    if (!mass && !attention && !diversity) return;

    for_each_row(grain(layout.chunks * (layout.queries + layout.dim)), [&](const HeadView<T>& head,
                                                                           int64_t row) {
      const int64_t first = row * layout.chunks;
      const int64_t chunks = (head.length + kChunkKeys - 1) / kChunkKeys;
      if (mass || attention) {
        window(head, row).combine_softmax(
            chunks, layout.queries, at(layout.peak, first * layout.queries),
            at(layout.total, first * layout.queries), at(layout.shift, row * layout.queries));
      }
      if (diversity)
        combine_directions(head, chunks, layout.dim, at(layout.anchor, first * layout.dim));
    });
    for_each_unit(
        1, [&](const HeadView<T>& head, int64_t row, int64_t, int64_t begin, int64_t end) {
          if (mass || attention) {
            window(head, row).column_sums(begin, end,
                                          at(layout.peak, row * layout.chunks * layout.queries),
                                          at(layout.shift, row * layout.queries));
          }
          if (diversity) {
            score_directions(head, begin, end, at(layout.anchor, row * layout.chunks * layout.dim));
          }
        });
    if (!attention) return;

    // As many chunks at once as the pool is wide: three times the keys of a piece are read.
    const int64_t width = p.pool / 2 < p.num_keys ? p.pool : p.num_keys;
    const int64_t piece = round_up(width, kChunkKeys);
    for_each_unit(grain(kChunkKeys), [&](const HeadView<T>& head, int64_t, int64_t, int64_t begin,
                                         int64_t) {
      if (begin % piece > 0) return;
      log_attention(head, p.pool, begin, head.length < begin + piece ? head.length : begin + piece);
    });
  }
};

inline void expert_scores_kernel(const ExpertScoresParams& params) {
  switch (params.dtype) {
    case DType::kFloat:
      return ExpertScores<float>{params}.run();
    case DType::kHalf:
      return ExpertScores<half_t>{params}.run();
    case DType::kBFloat16:
      return ExpertScores<bfloat16_t>{params}.run();
  }
}

}  // namespace
}  // namespace moekv::cpu::MOEKV_ISA
