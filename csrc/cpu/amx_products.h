// Products on AMX tiles, which multiply bf16 and add up in fp32. Numbers of more than 8 bits are
// cut into planes: x = plane 0 + plane 1 + ..., each plane the bf16 nearest to what is left. Two
// planes hold an fp16 exactly, three an fp32; of the products of planes i and j those with i + j > 2
// are below the rounding of fp32.
#pragma once

#include "head_view.h"
#include "vec.h"

#ifdef __AMX_BF16__

namespace moekv::cpu::MOEKV_ISA {
namespace {

template <typename T>
constexpr int kPlanes = 1;
template <>
constexpr int kPlanes<half_t> = 2;
template <>
constexpr int kPlanes<float> = 3;

// The intrinsics of GCC do not tell that they read memory.
inline void order_tile_loads() { __asm__ volatile("" ::: "memory"); }

template <typename T>
struct AmxProducts {
  static constexpr int kBlock = 32;  // keys whose products with a panel fill four tiles
  static constexpr int kTile = 64;
  static constexpr int kStep = 32;  // channels of a tile

  // Configures the tile registers of the thread: all eight hold 16 rows of 64 bytes.
  struct Session {
    Session() {
      struct {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } config;
      static_assert(sizeof config == 64);
      order_tile_loads();
      _tile_loadconfig(&config);
    }
    ~Session() { _tile_release(); }
    Session(const Session&) = delete;
  };

  struct Keys {
    alignas(64) bfloat16_t rows[kPlanes<T>][kTile * kMaxDim];  // [keys, dim rounded up to kStep]
  };

  static int64_t steps(int64_t dim) { return (dim + kStep - 1) / kStep; }
  // [plane][step][half of the panel][pair of channels][query][2]: tiles of 1024 bytes
  static int64_t panel_bytes(int64_t dim) { return kPlanes<T> * steps(dim) * 2048; }

  // Cuts x into planes, each to out[plane * stride].
  static void cut(const T* x, bfloat16_t* out, int64_t stride) {
    if constexpr (kPlanes<T> == 1) {
      *out = *x;
    } else {
      float left = to_float(*x);
      for (int plane = 0; plane < kPlanes<T>; ++plane) {
        out[plane * stride] = from_float<bfloat16_t>(left);
        left -= to_float(out[plane * stride]);
      }
    }
  }

  static void pack(const HeadView<T>& head, int64_t first, char* panel) {
    std::memset(panel, 0, panel_bytes(head.key_dim));
    bfloat16_t* out = reinterpret_cast<bfloat16_t*>(panel);
    const int64_t plane_stride = steps(head.key_dim) * 1024;
    for (int64_t lane = 0; lane < 32 && first + lane < head.query_rows(); ++lane) {
      const T* query = head.query_row(first + lane);
      for (int64_t d = 0; d < head.key_dim; ++d) {
        const int64_t tile = d / kStep * 2 + lane / 16;
        cut(query + d, out + tile * 512 + d % kStep / 2 * 32 + lane % 16 * 2 + d % 2, plane_stride);
      }
    }
  }

  static void stage(const HeadView<T>& head, int64_t begin, int count, Keys& keys) {
    const int64_t stride = steps(head.key_dim) * kStep;
    for (int i = 0; i < count; ++i) {
      const T* key = head.keys + (begin + i) * head.key_stride;
      if constexpr (kPlanes<T> == 1) {
        bfloat16_t* row = keys.rows[0] + i * stride;
        std::memcpy(row, key, head.key_dim * sizeof(T));
        std::memset(row + head.key_dim, 0, (stride - head.key_dim) * sizeof(T));
      } else {
        for (int64_t d = 0; d < stride; d += Vec::kLanes) {
          const int64_t lanes = head.key_dim - d;
          Vec left = lanes > 0 ? load_lanes(key + d, lanes) : Vec::set(0.0f);
          for (int plane = 0; plane < kPlanes<T>; ++plane) {
            bfloat16_t* row = keys.rows[plane] + i * stride + d;
            const __m256bh rounded = _mm512_cvtneps_pbh(left.v);
            std::memcpy(row, &rounded, sizeof rounded);
            left = left - Vec::load(row);
          }
        }
      }
    }
    const int padded = (count + kBlock - 1) / kBlock * kBlock;
    for (auto& rows : keys.rows) {
      std::memset(rows + count * stride, 0, (padded - count) * stride * sizeof(bfloat16_t));
    }
  }

  static void multiply(const Keys& keys, int count, const char* panel, int64_t dim,
                       float* products) {
    const int64_t stride = steps(dim) * kStep, row_bytes = stride * sizeof(bfloat16_t);
    order_tile_loads();
    for (int i = 0; i < count; i += kBlock) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int key_plane = 0; key_plane < kPlanes<T>; ++key_plane) {
        for (int plane = 0; plane < kPlanes<T> && plane + key_plane < 3; ++plane) {
          const bfloat16_t* key = keys.rows[key_plane] + i * stride;
          const char* query = panel + plane * stride * 64;
          for (int64_t d = 0; d < stride; d += kStep) {
            _tile_loadd(4, key + d, row_bytes);
            _tile_loadd(6, query + d * 64, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, query + d * 64 + 1024, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, key + 16 * stride + d, row_bytes);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
          }
        }
      }
      float* out = products + i * 32;
      _tile_stored(0, out, 128);
      _tile_stored(1, out + 16, 128);
      _tile_stored(2, out + 16 * 32, 128);
      _tile_stored(3, out + 16 * 32 + 16, 128);
    }
  }
};

}  // namespace
}  // namespace moekv::cpu::MOEKV_ISA

#endif
