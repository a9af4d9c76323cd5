// Tiles of rows that stream past the queries of ragged_attention, and meet them on tensor cores.
#pragma once

#include "ragged_parts.h"
#include "rows.h"
#include "tiles.h"

namespace moekv::cuda::ragged {

constexpr int kTileQueries = 16 * kWarps;

// Rows that meet the queries of a warp at once: where they lie in shared memory, and how far apart.
// Values so that lanes which read 16 bytes of every second row, four of them, meet in no bank.
template <typename T, int kChunks>
struct Tiles {
  static constexpr int kRows = kChunks <= 4 ? 32 : 16;  // 16 KiB at most, and registers of logits
  // Few rows would leave so few products to a chunk of channels that the compiler makes predicates
  // of the branch around them: all chunks are there, filled up with zeros.
  static constexpr int kKeyLanes = kRows == 32 ? 4 : 4 * kChunks;

  int key_dim, key_stride, value_stride, values, bytes;

  __host__ __device__ __forceinline__ Tiles(int key_dim, int value_dim)
      : key_dim(kRows == 32 ? key_dim : 32 * kChunks),
        key_stride(tile_stride<T>(this->key_dim)),
        value_stride(ceil_div(value_dim, 64) * 128 + 16),
        values(kRows * key_stride),
        bytes(values + kRows * value_stride) {}
};

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t bits;
  memcpy(&bits, pair, sizeof bits);
  return bits;
}

// 16 queries of a warp and rows that stream by. Lane l = 4g + t has, like in the accumulators of
// m16n8k16, the queries g and g + 8: their logits for rows 8j + 2t and 8j + 2t + 1 of a tile, and
// their sums for channels 64c + 16t ... 64c + 16t + 15, those of j and of 8 + j in sums[c][j].
template <typename T, int kChunks>
struct TileState {
  static constexpr int kColumns = Tiles<T, kChunks>::kRows / 8;
  static constexpr int kWideChunks = kChunks / 2;  // of 64 channels

  float highest[2], total[2];  // totals: of the lane's own logits
  float sums[kWideChunks][8][4];

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      highest[half] = -INFINITY;
      total[half] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kWideChunks * 32; ++i) sums[i / 32][i / 4 % 8][i % 4] = 0.0f;
  }

  // From logits to weights.
  __device__ __forceinline__ void weigh(float (&x)[kColumns][4], const Logit& logit) {
    float factor[2];
    bool grown = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float peak = highest[half];
#pragma unroll
      for (int i = 0; i < 2 * kColumns; ++i) peak = fmaxf(peak, x[i / 2][2 * half + i % 2]);
      peak = fmaxf(peak, __shfl_xor_sync(kFullWarp, peak, 1));
      peak = fmaxf(peak, __shfl_xor_sync(kFullWarp, peak, 2));
      grown = grown || peak != highest[half];
      factor[half] = logit.weight(highest[half], peak);
      highest[half] = peak;
      total[half] *= factor[half];
#pragma unroll
      for (int i = 0; i < 2 * kColumns; ++i) {
        float& weight = x[i / 2][2 * half + i % 2];
        weight = logit.weight(weight, peak);
        total[half] += weight;
      }
    }
    if (__any_sync(kFullWarp, grown)) {
#pragma unroll
      for (int i = 0; i < kWideChunks * 32; ++i) {
        sums[i / 32][i / 4 % 8][i % 4] *= factor[i % 4 / 2];
      }
    }
  }

  // m16n8k16 sums over pairs of neighbouring rows, which lie a row's length apart: a lane takes 16
  // bytes of each, eight channels, and joins them channel by channel.
  __device__ __forceinline__ void add(const float (&weights)[kColumns][4], const char* values,
                                      int stride, int dim) {
    const int g = static_cast<int>(threadIdx.x) % kWarpSize / 4;
    const int t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
    for (int step = 0; step < kColumns / 2; ++step) {
      const auto& left = weights[2 * step];
      const auto& right = weights[2 * step + 1];
      const uint32_t a[4] = {pack<T>(left[0], left[1]), pack<T>(left[2], left[3]),
                             pack<T>(right[0], right[1]), pack<T>(right[2], right[3])};
#pragma unroll
      for (int chunk = 0; chunk < kWideChunks; ++chunk) {
        if (chunk * 64 >= dim) break;
        uint32_t rows[4][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint4 bits = *reinterpret_cast<const uint4*>(
              values + (16 * step + i / 2 * 8 + 2 * t + i % 2) * stride + chunk * 128 + g * 16);
          memcpy(rows[i], &bits, sizeof bits);
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const auto join = [&](int first) {
            const uint32_t low = rows[first][j / 2], high = rows[first + 1][j / 2];
            return __byte_perm(low, high, j % 2 == 0 ? 0x5410 : 0x7632);
          };
          mma_m16n8k16<T>(sums[chunk][j], a, {join(0), join(2)});
        }
      }
    }
  }

  // The same where values may be infinite or NaN: a weight of 0 hides them.
  __device__ __forceinline__ void add_carefully(float (&weights)[kColumns][4], const char* values,
                                                int stride, int dim) {
    const int t = static_cast<int>(threadIdx.x) % 4;
    const char* row = values;
#pragma unroll 1
    for (int column = 0; column < kColumns; ++column) {
#pragma unroll 1
      for (int lane = 0; lane < 4; ++lane) {
#pragma unroll
        for (int i = 0; i < 2; ++i, row += stride) {
          const float weight[2] = {__shfl_sync(kFullWarp, weights[0][i], lane, 4),
                                   __shfl_sync(kFullWarp, weights[0][2 + i], lane, 4)};
#pragma unroll
          for (int j = 0; j < kWideChunks * 16; ++j) {
            const int channel = j / 16 * 64 + 16 * t + j % 16;
            if (j / 16 * 64 >= dim) break;
            const float value = to_float(reinterpret_cast<const T*>(row)[channel]);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              float& sum = sums[j / 16][j % 8][2 * half + j % 16 / 8];
              if (weight[half] != 0.0f) sum = fmaf(weight[half], value, sum);
            }
          }
        }
      }
      // The next column becomes the first: registers have no index.
#pragma unroll
      for (int i = 0; i < 4 * (kColumns - 1); ++i)
        weights[i / 4][i % 4] = weights[i / 4 + 1][i % 4];
    }
  }

  __device__ __forceinline__ bool is_finite() const {
    float zero = 0.0f;
#pragma unroll
    for (int i = 0; i < kWideChunks * 32; ++i) {
      zero = fmaf(sums[i / 32][i / 4 % 8][i % 4], 0.0f, zero);
    }
    return !isnan(zero);
  }

  // The queries from `first` on.
  __device__ __forceinline__ void write(const Arguments& arguments, int64_t chunk_of_all,
                                        int first) {
    const int g = static_cast<int>(threadIdx.x / 4 % 8), t = static_cast<int>(threadIdx.x % 4);
    const int dim = static_cast<int>(arguments.params.value_dim);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[half] += __shfl_xor_sync(kFullWarp, total[half], 1);
      total[half] += __shfl_xor_sync(kFullWarp, total[half], 2);
      const int query = first + 8 * half + g;
      if (query >= arguments.rows) continue;
      const int64_t state = chunk_of_all * arguments.rows + query;
      if (t == 0)
        arguments.extents[state] = make_float2(highest[half] * arguments.extent_unit, total[half]);
      float* out = arguments.sums + state * dim;
#pragma unroll
      for (int i = 0; i < kWideChunks * 16; i += 4) {
        const int channel = i / 16 * 64 + 16 * t + i % 16;
        float four[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          four[j] = sums[i / 16][(i + j) % 8][2 * half + i % 16 / 8];
        }
        if (dim % 4 == 0) {
          if (channel < dim) {
            *reinterpret_cast<float4*>(out + channel) =
                make_float4(four[0], four[1], four[2], four[3]);
          }
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (channel + j < dim) out[channel + j] = four[j];
          }
        }
      }
    }
  }
};

// Halves of a tile's rows, `columns` of each, which a thread holds for as long as they are under
// way.
template <int kCount>
struct Halves {
  uint16_t bits[kCount];

  // Zeros beyond num_rows.
  __device__ __forceinline__ void load(const uint16_t* rows, int64_t stride, int columns,
                                       int num_rows) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const int i = static_cast<int>(threadIdx.x) + k * kThreads;
      const int64_t place = stride == columns ? i : i / columns * stride + i % columns;
      bits[k] = i < num_rows * columns ? __ldg(rows + place) : uint16_t{0};
    }
  }
  __device__ __forceinline__ void store(uint16_t* target, int size) const {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const int i = static_cast<int>(threadIdx.x) + k * kThreads;
      if (i < size) target[i] = bits[k];
    }
  }
};

// Rows of 16 bits, in two stages of shared memory.
template <typename T, int kChunks>
struct DenseSource {
  static constexpr bool kHasTail = true;
  using Layout = Tiles<T, kChunks>;
  static size_t shared_bytes(const Arguments& arguments) {
    const RaggedAttentionParams& params = arguments.params;
    return 2 * Layout(static_cast<int>(params.key_dim), static_cast<int>(params.value_dim)).bytes;
  }

  Layout layout;
  PairRows<T> keys, values;
  char* shared;
  int key_dim, value_dim;

  __device__ __forceinline__ DenseSource(const Arguments& arguments, const Part& part, char* shared)
      : layout(static_cast<int>(arguments.params.key_dim),
               static_cast<int>(arguments.params.value_dim)),
        keys(part.pairs<T>(arguments, arguments.keys)),
        values(part.pairs<T>(arguments, arguments.values)),
        shared(shared),
        key_dim(static_cast<int>(arguments.params.key_dim)),
        value_dim(static_cast<int>(arguments.params.value_dim)) {}

  // Makes queries meet the rows.
  __device__ __forceinline__ void prepare(uint4 (&)[1][2][kChunks]) const {}
  // Starts to copy the rows from `row` on; there is a first of them.
  __device__ __forceinline__ void copy(int row, int stage) {
    char* tile = shared + stage * layout.bytes;
    copy_tile<kThreads, T, Layout::kKeyLanes>(tile, layout.key_stride, keys, row, Layout::kRows,
                                              key_dim);
    copy_tile<kThreads, T, 8>(tile + layout.values, layout.value_stride, values, row, Layout::kRows,
                              value_dim);
  }
  // What copies to shared memory cannot take, for the first tile.
  __device__ __forceinline__ void put() {}
  // The tile that was copied, behind a barrier.
  __device__ __forceinline__ const char* tile(int stage) { return shared + stage * layout.bytes; }
};

template <typename T, int kChunks, typename Source, typename... Plan>
__device__ __forceinline__ void attend_tiles(const Arguments& arguments, char* shared,
                                             const Plan&... plan) {
  const RaggedAttentionParams& params = arguments.params;
  const Cut cut(arguments);
  const unsigned tiles = ceil_div(static_cast<unsigned>(arguments.rows), unsigned{kTileQueries});
  const unsigned number = blockIdx.x / tiles;
  const Chunk chunk = cut.find(params, number);
  if (chunk.head == cut.num_heads) return;
  const int block_query = static_cast<int>(blockIdx.x % tiles) * kTileQueries;
  Part part(arguments, cut, chunk, number, block_query);
  const int num_queries = static_cast<int>(params.num_queries);
  const int num_stored = part.rows.num_stored;
  if (Source::kHasTail && params.num_tail > 0) {
    // What is behind the last of the block's queries is seen by none.
    const int last_query = min(block_query + kTileQueries, arguments.rows) - 1;
    const bool one_head = block_query / num_queries == last_query / num_queries;
    const int last = one_head ? last_query % num_queries : num_queries - 1;
    part.end =
        min(part.end, num_stored + static_cast<int>(params.num_tail) - num_queries + last + 1);
  }
  // The same for all threads, which the compiler cannot know of what comes from shared memory: the
  // loop below is to run in whole warps.
  const int end = __shfl_sync(kFullWarp, part.end, 0);

  using Layout = Tiles<T, kChunks>;
  Source source(arguments, part, shared, plan...);
  const Layout& layout = source.layout;
  const auto copy = [&](int row, int stage) {
    if (row < end) source.copy(row, stage);
    copy_async_commit();
  };

  const int thread = static_cast<int>(threadIdx.x);
  const int g = thread % kWarpSize / 4;
  const int t = thread % 4;
  const int warp_query = block_query + thread / kWarpSize * 16;
  const bool idle = warp_query >= arguments.rows;
  uint4 queries[1][2][kChunks];
  load_fragments(part.queries<T>(arguments), warp_query, static_cast<int>(params.key_dim), queries);
  source.prepare(queries);
  const int value_dim = static_cast<int>(params.value_dim);
  const Logit& logit = arguments.logit;

  const int last_stored = Source::kHasTail ? min(end, num_stored) : end;
  MOEKV_SHARED(float, offsets, Layout::kRows);  // of the tile's logits, before they are scaled
  Halves<1> biases;
  const auto load_biases = [&](int row) {
    if (!params.bias) return;
    biases.load(params.bias + part.rows.begin + row, 1, 1, min(Layout::kRows, last_stored - row));
  };

  using State = TileState<T, kChunks>;
  State state;
  int rounds = 1;
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    state.reset();
    // Here, or what follows from it is worked out before the rounds, and takes registers.
    const int begin = __shfl_sync(kFullWarp, part.begin, 0);
    copy(begin, 0);
    source.put();
    load_biases(begin);
#pragma unroll 1
    for (int row = begin, stage = 0; row < end; row += Layout::kRows, stage ^= 1) {
      copy(row + Layout::kRows, stage ^ 1);
      copy_async_wait<1>();
      if (params.bias && thread < Layout::kRows) {
        offsets[thread] = logit.unscaled_offset(half_of(biases.bits[0]));
      }
      load_biases(row + Layout::kRows);
      __syncthreads();
      const char* tile = source.tile(stage);
      if (!idle) {
        float logits[1][State::kColumns][4] = {};
        multiply_tile<T>(queries, tile, layout.key_dim, logits);
        cap_products(logits, logit);
        if (params.bias) {
#pragma unroll
          for (int i = 0; i < 2 * State::kColumns; ++i) {
            const float offset = offsets[i / 2 * 8 + 2 * t + i % 2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              float& its = logits[0][i / 2][2 * half + i % 2];
              its = offset_by(its, offset);
            }
          }
        }
        if (row + Layout::kRows > last_stored) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int query = min(warp_query + 8 * half + g, arguments.rows - 1);
            const Sight sees = part.sight(arguments, query);  // of the tail
#pragma unroll
            for (int i = 0; i < 2 * State::kColumns; ++i) {
              const int its_row = row + i / 2 * 8 + 2 * t + i % 2;
              const bool visible = its_row < last_stored || (Source::kHasTail && its_row < end &&
                                                             sees(its_row - num_stored));
              if (!visible) logits[0][i / 2][2 * half + i % 2] = -INFINITY;
            }
          }
        }
        state.weigh(logits[0], logit);
        const char* its_values = tile + layout.values;
        if (round > 0) {
          state.add_carefully(logits[0], its_values, layout.value_stride, value_dim);
        } else {
          state.add(logits[0], its_values, layout.value_stride, value_dim);
        }
      }
      __syncthreads();
    }
    // In products 0 times infinity is NaN. That is rare, and then a second round is careful.
    const int wrong = __syncthreads_or(!state.is_finite());
    rounds = __shfl_sync(kFullWarp, wrong, 0) != 0 ? 2 : 1;
  }
  // The same number again, worked out anew: the rounds have no register to keep for it.
  state.write(arguments, part.chunk, __shfl_sync(kFullWarp, warp_query, 0));
}

}  // namespace moekv::cuda::ragged
