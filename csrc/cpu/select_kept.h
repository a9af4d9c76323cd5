// Radix select of the kept pairs: the threshold of a group is found digit by digit from histograms,
// then one ordered pass writes the positions at or above it. Nothing is sorted.
//
// A score becomes a 32-bit integer of the same order; 16-bit scores go through fp32, whose low bits
// are then zero and need no digit. What a row keeps in any case (sinks, window) never enters.
// What it needs for its floor is a prefix of its own order: it is taken out of the group's
// histograms from the top, and only where the group's threshold leaves a row below its floor does
// the row get a threshold of its own.
#pragma once

#include "../params.h"
#include "parallel.h"
#include "select_plan.h"
#include "vec.h"

namespace moekv::cpu::MOEKV_ISA {
namespace {

constexpr int32_t kNaNKey = INT32_MIN;  // below -inf, which is -0x7f800000

// Vec::kLanes integers; a bit mask has one bit per lane.
#if defined(__AVX512F__)

struct Ints {
  __m512i v;

  // Keys in the order of the scores: a sign and magnitude becomes two's complement.
  static Ints keys(Vec scores) {
    const __m512i bits = _mm512_castps_si512(scores.v);
    const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
    const __m512i key = _mm512_mask_sub_epi32(magnitude, _mm512_movepi32_mask(bits),
                                              _mm512_setzero_si512(), magnitude);
    const __mmask16 nan = _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(0x7f800000));
    return {_mm512_mask_mov_epi32(key, nan, _mm512_set1_epi32(kNaNKey))};
  }
  static Ints count_from(int32_t first) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return {_mm512_add_epi32(lanes, _mm512_set1_epi32(first))};
  }
  // The key's bits from `shift` up, as an unsigned number in the order of keys.
  Ints digits_from(int shift) const {
    const __m512i biased = _mm512_xor_si512(v, _mm512_set1_epi32(INT32_MIN));
    return {_mm512_srl_epi32(biased, _mm_cvtsi32_si128(shift))};
  }
  Ints operator&(int32_t x) const { return {_mm512_and_si512(v, _mm512_set1_epi32(x))}; }
  uint32_t above(int32_t x) const { return _mm512_cmpgt_epi32_mask(v, _mm512_set1_epi32(x)); }
  uint32_t equal(int32_t x) const { return _mm512_cmpeq_epi32_mask(v, _mm512_set1_epi32(x)); }
  // The lanes of the mask one behind another, then anything: writes kLanes.
  void compress(uint32_t mask, int32_t* p) const {
    _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), v));
  }
};

#elif defined(__AVX2__)

// Byte i of entry m: the lane of the i-th bit that is set in m.
struct CompressTable {
  uint64_t lanes[256];
  constexpr CompressTable() : lanes{} {
    for (uint64_t mask = 0; mask < 256; ++mask) {
      int shift = 0;
      for (uint64_t lane = 0; lane < 8; ++lane) {
        if (mask >> lane & 1) {
          lanes[mask] |= lane << shift;
          shift += 8;
        }
      }
    }
  }
};
constexpr CompressTable kCompressTable;

struct Ints {
  __m256i v;

  static Ints keys(Vec scores) {
    const __m256i bits = _mm256_castps_si256(scores.v);
    const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
    const __m256i sign = _mm256_srai_epi32(bits, 31);
    const __m256i key = _mm256_sub_epi32(_mm256_xor_si256(magnitude, sign), sign);
    const __m256i nan = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7f800000));
    return {_mm256_blendv_epi8(key, _mm256_set1_epi32(kNaNKey), nan)};
  }
  static Ints count_from(int32_t first) {
    const __m256i lanes = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    return {_mm256_add_epi32(lanes, _mm256_set1_epi32(first))};
  }
  Ints digits_from(int shift) const {
    const __m256i biased = _mm256_xor_si256(v, _mm256_set1_epi32(INT32_MIN));
    return {_mm256_srl_epi32(biased, _mm_cvtsi32_si128(shift))};
  }
  Ints operator&(int32_t x) const { return {_mm256_and_si256(v, _mm256_set1_epi32(x))}; }
  static uint32_t bits(__m256i lanes) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(lanes)));
  }
  uint32_t above(int32_t x) const { return bits(_mm256_cmpgt_epi32(v, _mm256_set1_epi32(x))); }
  uint32_t equal(int32_t x) const { return bits(_mm256_cmpeq_epi32(v, _mm256_set1_epi32(x))); }
  void compress(uint32_t mask, int32_t* p) const {
    const __m128i lanes = _mm_cvtsi64_si128(static_cast<int64_t>(kCompressTable.lanes[mask]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm256_permutevar8x32_epi32(v, _mm256_cvtepu8_epi32(lanes)));
  }
};

#else

struct Ints {
  int32_t v[4];

  static Ints keys(Vec scores) {
    Ints keys;
    for (int i = 0; i < 4; ++i) {
      const uint32_t bits = float_to_bits(scores.v[i]);
      const auto magnitude = static_cast<int32_t>(bits & 0x7fffffffu);
      const int32_t key = bits >> 31 ? -magnitude : magnitude;
      keys.v[i] = magnitude > 0x7f800000 ? kNaNKey : key;
    }
    return keys;
  }
  static Ints count_from(int32_t first) { return {{first, first + 1, first + 2, first + 3}}; }
  Ints digits_from(int shift) const {
    Ints digits;
    for (int i = 0; i < 4; ++i) {
      digits.v[i] = static_cast<int32_t>((static_cast<uint32_t>(v[i]) ^ 0x80000000u) >> shift);
    }
    return digits;
  }
  Ints operator&(int32_t x) const { return {{v[0] & x, v[1] & x, v[2] & x, v[3] & x}}; }
  uint32_t above(int32_t x) const {
    return (v[0] > x) | (v[1] > x) << 1 | (v[2] > x) << 2 | (v[3] > x) << 3;
  }
  uint32_t equal(int32_t x) const {
    return (v[0] == x) | (v[1] == x) << 1 | (v[2] == x) << 2 | (v[3] == x) << 3;
  }
  void compress(uint32_t mask, int32_t* p) const {
    int32_t lanes[4];
    int count = 0;
    for (int i = 0; i < 4; ++i) {
      lanes[count & 3] = v[i];
      count += mask >> i & 1;
    }
    std::memcpy(p, lanes, sizeof lanes);
  }
};

#endif

constexpr uint32_t kAllLanes = (1u << Vec::kLanes) - 1;

// Calls function(position, keys, mask) on vectors that cover [begin, end).
template <typename T, typename Function>
inline void for_each_vector(const T* scores, int64_t begin, int64_t end, const Function& function) {
  for (; begin + Vec::kLanes <= end; begin += Vec::kLanes) {
    function(begin, Ints::keys(Vec::load(scores + begin)), kAllLanes);
  }
  if (begin < end) {
    function(begin, Ints::keys(load_partial(scores + begin, end - begin)),
             (1u << (end - begin)) - 1);
  }
}

// The digits of a key from the top: {lowest bit, bits}.
struct Digit {
  int shift, bits;
};
template <typename T>
struct Digits;
template <>
struct Digits<float> {
  static constexpr Digit kAll[] = {{21, 11}, {10, 11}, {0, 10}};
};
template <>
struct Digits<half_t> {
  static constexpr Digit kAll[] = {{21, 11}, {13, 8}};
};
template <>
struct Digits<bfloat16_t> {
  static constexpr Digit kAll[] = {{21, 11}, {16, 5}};
};

// Selects the pairs of one group at a time.
template <typename T>
class GroupSelect {
 public:
  GroupSelect(const SelectKeptParams& p, const SelectPlan& plan, int64_t slot)
      : p_(p), num_chunks_(plan.chunks_per_row) {
    char* workspace = static_cast<char*>(p.workspace) + slot * plan.slot_bytes;
    chunks_ = reinterpret_cast<SelectChunk*>(workspace);
    rows_ = reinterpret_cast<SelectRow*>(chunks_ + p.rows * num_chunks_);
  }

  // `first_index`: where the group's indices begin.
  void run(int64_t group, int64_t first_index) {
    scores_ = static_cast<const T*>(p_.scores) + group * p_.score_stride[0];
    const int64_t total = p_.total[group];
    int64_t undecided = 0;  // pairs in question that no floor claims
    int64_t need = total - plan_rows(group, total, undecided);
    if (need >= undecided) {
      need -= undecided;
      for (int64_t r = 0; r < p_.rows; ++r) {
        SelectRow& row = rows_[r];
        row.low = row.high;
        row.floor = 0;
        const int64_t more = minimum(need, row.start - row.padding);
        row.padding += more;
        need -= more;
      }
    }
    set_thresholds(need);
    write_offsets(group, first_index);
    write_indices();
  }

 private:
  static int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
  static int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }

  // What each row keeps without looking at other rows. Returns how many pairs these are.
  int64_t plan_rows(int64_t group, int64_t total, int64_t& undecided) {
    const int64_t num_keys = p_.num_keys, share = total / p_.rows;
    const int64_t sinks = minimum(p_.sinks, share);
    const int64_t window = minimum(p_.window, share - sinks);
    // A row that shares with nobody gets its total, which is no less than its floor.
    const int64_t floor = p_.rows == 1 ? 0 : minimum(p_.floor, share);
    int64_t claimed = 0;
    for (int64_t r = 0; r < p_.rows; ++r) {
      SelectRow& row = rows_[r];
      const int64_t start = p_.start ? p_.start[group * p_.rows + r] : 0;
      row.start = minimum(maximum(start, 0), num_keys);
      row.low = minimum(row.start + sinks, num_keys);
      row.high = maximum(row.low, num_keys - window);
      const int64_t always = row.low - row.start + num_keys - row.high;
      const int64_t lacking = maximum(floor - always, 0);
      row.floor = minimum(lacking, row.high - row.low);
      row.padding = lacking - row.floor;
      claimed += always + lacking;
      undecided += row.high - row.low - row.floor;
    }
    return claimed;
  }

  // `need`: how many pairs the scores decide on, beside the rows' floors.
  void set_thresholds(int64_t need) {
    for (int64_t r = 0; r < p_.rows; ++r) {
      rows_[r].floor_left = rows_[r].floor;
      for (int64_t c = 0; c < num_chunks_; ++c) chunk(r, c).above = chunk(r, c).equal = 0;
    }
    const int32_t threshold = need > 0 ? find_threshold(0, p_.rows, need) : INT32_MAX;
    for (int64_t r = 0; r < p_.rows; ++r) {
      SelectRow& row = rows_[r];
      int64_t equal = 0;
      for (int64_t c = 0; c < num_chunks_; ++c) equal += chunk(r, c).equal;
      // Ties of the floor are the row's first; the others go to the lower row.
      const int64_t more = minimum(need, maximum(equal - row.floor_left, 0));
      need -= more;
      row.threshold = threshold;
      row.ties = minimum(row.floor_left, equal) + more;
      row.floor_left -= minimum(row.floor_left, equal);
    }
    parallel_for(0, p_.rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        SelectRow& row = rows_[r];
        if (row.floor_left == 0) continue;
        row.floor_left = 0;
        row.ties = row.floor;
        row.threshold = find_threshold(r, r + 1, row.ties);
      }
    });
  }

  // The key of the need-th best pair that no floor claims, 1 <= need <= their number. `need`
  // becomes the number of pairs at that key which count.
  int32_t find_threshold(int64_t first_row, int64_t last_row, int64_t& need) {
    for (int64_t i = first_row * num_chunks_; i < last_row * num_chunks_; ++i) chunks_[i].above = 0;
    uint32_t prefix = 0;
    int lowest_bit = 32;
    for (const Digit digit : Digits<T>::kAll) {
      parallel_for(first_row * num_chunks_, last_row * num_chunks_, 1,
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) count_digits(i, digit, prefix);
                   });
      const int32_t bin = choose_bin(first_row, last_row, digit, need);
      prefix = prefix << digit.bits | static_cast<uint32_t>(bin);
      lowest_bit = digit.shift;
    }
    return static_cast<int32_t>(prefix << lowest_bit ^ 0x80000000u);
  }

  // The histogram of a digit over those keys of a chunk whose higher digits are `prefix`.
  void count_digits(int64_t item, Digit digit, uint32_t prefix) {
    int32_t* histogram = chunks_[item].histogram;
    std::memset(histogram, 0, sizeof(chunks_[item].histogram));
    const Range range = chunk_range(item);
    const int above = digit.shift + digit.bits;
    for_each_vector(row_scores(item), range.begin, range.end,
                    [&](int64_t, Ints keys, uint32_t mask) {
                      if (above < 32) {
                        mask &= keys.digits_from(above).equal(static_cast<int32_t>(prefix));
                      }
                      if (mask == 0) return;
                      int32_t digits[Vec::kLanes];
                      const Ints all = keys.digits_from(digit.shift) & ((1 << digit.bits) - 1);
                      all.compress(mask, digits);
                      if (mask == kAllLanes) {
                        for (int i = 0; i < Vec::kLanes; ++i) ++histogram[digits[i]];
                      } else {
                        const int count = __builtin_popcount(mask);
                        for (int i = 0; i < count; ++i) ++histogram[digits[i]];
                      }
                    });
  }

  // The bin of the rows' histograms in which the need-th best pair lies that no floor claims.
  int32_t choose_bin(int64_t first_row, int64_t last_row, Digit digit, int64_t& need) {
    const int32_t bins = 1 << digit.bits;
    int64_t counts[kSelectBins] = {};
    for (int64_t i = first_row * num_chunks_; i < last_row * num_chunks_; ++i) {
      for (int32_t b = 0; b < bins; ++b) counts[b] += chunks_[i].histogram[b];
    }
    for (int64_t r = first_row; r < last_row; ++r) {
      int64_t claimed = rows_[r].floor_left;
      for (int32_t b = bins - 1; b >= 0 && claimed > 0; --b) {
        int64_t in_row = 0;
        for (int64_t c = 0; c < num_chunks_; ++c) in_row += chunk(r, c).histogram[b];
        const int64_t taken = minimum(claimed, in_row);
        counts[b] -= taken;
        claimed -= taken;
      }
    }
    int32_t bin = bins - 1;
    for (; counts[bin] < need; --bin) need -= counts[bin];

    for (int64_t r = first_row; r < last_row; ++r) {
      int64_t above = 0;
      for (int64_t c = 0; c < num_chunks_; ++c) {
        SelectChunk& part = chunk(r, c);
        int64_t part_above = 0;
        for (int32_t b = bin + 1; b < bins; ++b) part_above += part.histogram[b];
        part.above += part_above;
        part.equal = part.histogram[bin];
        above += part_above;
      }
      rows_[r].floor_left -= minimum(rows_[r].floor_left, above);
    }
    return bin;
  }

  void write_offsets(int64_t group, int64_t first_index) {
    int32_t* offsets = p_.offsets + group * p_.rows + 1;  // behind the 0 of the first row
    for (int64_t r = 0; r < p_.rows; ++r) {
      const SelectRow& row = rows_[r];
      first_index += row.padding + row.low - row.start;
      int64_t ties = row.ties;
      for (int64_t c = 0; c < num_chunks_; ++c) {
        SelectChunk& part = chunk(r, c);
        part.first_index = first_index;
        part.ties = minimum(ties, part.equal);
        ties -= part.ties;
        first_index += part.above + part.ties;
      }
      first_index += p_.num_keys - row.high;
      offsets[r] = static_cast<int32_t>(first_index);
    }
  }

  void write_indices() {
    parallel_for(0, p_.rows * num_chunks_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const SelectRow& row = rows_[item / num_chunks_];
        const SelectChunk& part = chunks_[item];
        int32_t* first = p_.indices + part.first_index;
        int32_t* last = first + part.above + part.ties;
        if (item % num_chunks_ == 0) {
          int32_t* sinks = write_range(first - row.padding - (row.low - row.start), 0, row.padding);
          write_range(sinks, row.start, row.low);
        }
        if (item % num_chunks_ == num_chunks_ - 1) write_range(last, row.high, p_.num_keys);
        if (first < last) write_kept(item, row.threshold, part.ties, first, last);
      }
    });
  }

  static int32_t* write_range(int32_t* target, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) *target++ = static_cast<int32_t>(i);
    return target;
  }

  void write_kept(int64_t item, int32_t threshold, int64_t ties, int32_t* target, int32_t* last) {
    const Range range = chunk_range(item);
    for_each_vector(row_scores(item), range.begin, range.end,
                    [&](int64_t position, Ints keys, uint32_t mask) {
                      uint32_t kept = keys.above(threshold) & mask;
                      uint32_t equal = keys.equal(threshold) & mask;
                      for (; equal && ties > 0; --ties, equal &= equal - 1) kept |= equal & -equal;
                      if (kept == 0) return;
                      const int count = __builtin_popcount(kept);
                      const Ints positions = Ints::count_from(static_cast<int32_t>(position));
                      if (last - target >= Vec::kLanes) {
                        positions.compress(kept, target);
                      } else {
                        int32_t buffer[Vec::kLanes];
                        positions.compress(kept, buffer);
                        std::memcpy(target, buffer, count * sizeof(int32_t));
                      }
                      target += count;
                    });
  }

  struct Range {
    int64_t begin, end;
  };
  Range chunk_range(int64_t item) const {
    const SelectRow& row = rows_[item / num_chunks_];
    const int64_t begin = minimum(row.low + item % num_chunks_ * kSelectChunk, row.high);
    return {begin, minimum(begin + kSelectChunk, row.high)};
  }
  const T* row_scores(int64_t item) const {
    return scores_ + item / num_chunks_ * p_.score_stride[1];
  }
  SelectChunk& chunk(int64_t row, int64_t c) { return chunks_[row * num_chunks_ + c]; }

  const SelectKeptParams& p_;
  const int64_t num_chunks_;  // of a row
  SelectChunk* chunks_;       // [rows, num_chunks]
  SelectRow* rows_;
  const T* scores_ = nullptr;  // of the group
};

template <typename T>
inline void select_kept_typed(const SelectKeptParams& p) {
  p.offsets[0] = 0;
  if (p.rows == 0) return;
  const SelectPlan plan = select_plan(p);
  const auto run = [&](int64_t slot) {
    GroupSelect<T> select(p, plan, slot);
    int64_t first_index = 0;
    for (int64_t group = 0; group < p.groups; ++group) {
      if (group % plan.slots == slot) select.run(group, first_index);
      first_index += p.total[group];
    }
  };
  if (plan.slots == 1) return run(0);
  parallel_for(0, plan.slots, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) run(slot);
  });
}

inline void select_kept_kernel(const SelectKeptParams& p) {
  switch (p.dtype) {
    case DType::kFloat:
      return select_kept_typed<float>(p);
    case DType::kHalf:
      return select_kept_typed<half_t>(p);
    case DType::kBFloat16:
      return select_kept_typed<bfloat16_t>(p);
  }
}

}  // namespace
}  // namespace moekv::cpu::MOEKV_ISA
