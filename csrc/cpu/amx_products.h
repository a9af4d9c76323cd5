// Products on AMX tiles, which multiply bf16 and add up in fp32. Numbers of more than 8 bits are
// cut into planes: x = plane 0 + plane 1 + ..., each plane the bf16 nearest to what is left. Two
// planes hold an fp16 exactly, three an fp32; of the products of planes i and j those with i + j >
// 2 are below the rounding of fp32.
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

  // The planes of x, each to out[plane * plane_stride], filled up with zeros to whole steps.
  static void cut(const T* x, int64_t dim, bfloat16_t* out, int64_t plane_stride) {
    int64_t d = 0;
    for (; d + kStep <= dim; d += kStep) cut_step(x + d, out + d, plane_stride);
    if (d < dim) {
      T rest[kStep] = {};
      std::memcpy(rest, x + d, (dim - d) * sizeof(T));
      cut_step(rest, out + d, plane_stride);
    }
  }

  static void cut_step(const T* x, bfloat16_t* out, int64_t plane_stride) {
    if constexpr (kPlanes<T> == 1) {
      std::memcpy(out, x, kStep * sizeof(T));
    } else {
      Vec left[2] = {Vec::load(x), Vec::load(x + Vec::kLanes)};
      for (int plane = 0; plane < kPlanes<T>; ++plane, out += plane_stride) {
        const __m512bh rounded = _mm512_cvtne2ps_pbh(left[1].v, left[0].v);
        std::memcpy(out, &rounded, sizeof rounded);
        left[0] = left[0] - Vec::load(out);
        left[1] = left[1] - Vec::load(out + Vec::kLanes);
      }
    }
  }

  template <typename RowOf>
  static void pack(const RowOf& row_of, int64_t count, int64_t dim, char* panel) {
    std::memset(panel, 0, panel_bytes(dim));
    alignas(64) bfloat16_t planes[kPlanes<T>][kMaxDim];
    for (int64_t lane = 0; lane < 32 && lane < count; ++lane) {
      cut(row_of(lane), dim, planes[0], kMaxDim);
      char* out = panel + lane / 16 * 1024 + lane % 16 * 4;
      for (const auto& plane : planes) {
        for (int64_t step = 0; step < steps(dim); ++step, out += 2048) {
          for (int pair = 0; pair < 16; ++pair) {
            std::memcpy(out + pair * 64, plane + step * kStep + pair * 2, 4);
          }
        }
      }
    }
  }

  template <typename RowOf>
  static void stage(const RowOf& row_of, int count, int64_t dim, Keys& keys) {
    const int64_t stride = steps(dim) * kStep;
    for (int i = 0; i < count; ++i) {
      cut(row_of(i), dim, keys.rows[0] + i * stride, kTile * kMaxDim);
    }
    const int padded = (count + kBlock - 1) / kBlock * kBlock;
    for (auto& rows : keys.rows) {
      std::memset(rows + count * stride, 0, (padded - count) * stride * sizeof(bfloat16_t));
    }
  }

  template <typename Work>
  static void multiply(const Keys& keys, int count, const char* panel, int64_t dim, float* products,
                       const Work& work) {
    constexpr int kPairs = kPlanes<T> == 1 ? 1 : kPlanes<T> == 2 ? 4 : 6;  // of planes
    const int64_t stride = steps(dim) * kStep, row_bytes = stride * sizeof(bfloat16_t);
    const int parts = (count + kBlock - 1) / kBlock * kPairs * static_cast<int>(steps(dim));
    const int share = (kTile + parts - 1) / parts;
    int worked = 0;
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
            work(worked, worked + share);
            worked += share;
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
