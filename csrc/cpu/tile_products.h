// Dot products of a tile of keys with a panel of queries, the inner loop of window attention; in
// expected attention the two change places.
//
// Queries are packed once per head into panels of kPanel rows, keys are staged tile by tile; lanes
// run over queries, so that per-query numbers of the softmax are vectors. Both come as functions
// from a row's number to its address. multiply() writes products [key][query], kPanel floats a key;
// in between it calls work(from, to) until the ranges cover [0, kTile).
#pragma once

#include "amx_products.h"
#include "head_view.h"
#include "vec.h"

namespace moekv::cpu::MOEKV_ISA {
namespace {

constexpr int kPanel = 2 * Vec::kLanes;

// The logit of a key that the query does not see. What is subtracted from it is finite.
constexpr float kHiddenLogit = -__builtin_inff();
constexpr float kLeastPeak = -3.4028234663852886e38f;  // no logit that is seen is lower

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunknown-pragmas"

// Fused multiply-adds on fp32: any dtype, any vector width.
template <typename T>
struct FmaProducts {
#if defined(__AVX512F__)
  static constexpr int kBlock = 12;  // keys whose products with a panel fill the registers
#else
  static constexpr int kBlock = 6;
#endif
  static constexpr int kTile = 48;

  struct Session {};  // what a thread must hold while it multiplies

  struct Keys {
    alignas(64) float rows[kTile * kMaxDim];  // [keys, dim rounded up to lanes]
    int64_t stride;
  };

  static int64_t panel_bytes(int64_t dim) { return dim * kPanel * sizeof(float); }

  // panel [dim][lane], with zeros in lanes >= count
  template <typename RowOf>
  static void pack(const RowOf& row_of, int64_t count, int64_t dim, char* panel) {
    float* out = reinterpret_cast<float*>(panel);
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      const T* row = lane < count ? row_of(lane) : nullptr;
      for (int64_t d = 0; d < dim; ++d) out[d * kPanel + lane] = row ? to_float(row[d]) : 0.0f;
    }
  }

  template <typename RowOf>
  static void stage(const RowOf& row_of, int count, int64_t dim, Keys& keys) {
    keys.stride = (dim + Vec::kLanes - 1) / Vec::kLanes * Vec::kLanes;
    for (int i = 0; i < count; ++i) {
      const T* from = row_of(i);
      float* row = keys.rows + i * keys.stride;
      int64_t d = 0;
      for (; d + Vec::kLanes <= dim; d += Vec::kLanes) Vec::load(from + d).store(row + d);
      if (d < dim) load_partial(from + d, dim - d).store(row + d);
    }
    const int padded = (count + kBlock - 1) / kBlock * kBlock;
    std::memset(keys.rows + count * keys.stride, 0, (padded - count) * keys.stride * sizeof(float));
  }

  template <typename Work>
  static void multiply(const Keys& keys, int count, const char* panel, int64_t dim, float* products,
                       const Work& work) {
    const float* queries = reinterpret_cast<const float*>(panel);
    work(0, kTile);  // the same units multiply and exponentiate: nothing to gain from interleaving
    for (int i = 0; i < count; i += kBlock) {
      const float* key = keys.rows + i * keys.stride;
      Vec sums[kBlock][2];
      for (auto& sum : sums) sum[0] = sum[1] = Vec::set(0.0f);
      for (int64_t d = 0; d < dim; ++d) {
        const Vec q0 = Vec::load(queries + d * kPanel);
        const Vec q1 = Vec::load(queries + d * kPanel + Vec::kLanes);
#pragma GCC unroll 12
        for (int j = 0; j < kBlock; ++j) {
          const Vec k = Vec::set(key[j * keys.stride + d]);
          sums[j][0] = fma(k, q0, sums[j][0]);
          sums[j][1] = fma(k, q1, sums[j][1]);
        }
      }
      for (int j = 0; j < kBlock; ++j) {
        sums[j][0].store(products + (i + j) * kPanel);
        sums[j][1].store(products + (i + j) * kPanel + Vec::kLanes);
      }
    }
  }
};

#pragma GCC diagnostic pop

#ifdef __AMX_BF16__
template <typename T>
using TileProducts = AmxProducts<T>;
#else
template <typename T>
using TileProducts = FmaProducts<T>;
#endif

}  // namespace
}  // namespace moekv::cpu::MOEKV_ISA
