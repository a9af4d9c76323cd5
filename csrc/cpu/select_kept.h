// Softmax, biased top-k and load statistics of a router.
#pragma once

#include "../params.h"
#include "parallel.h"
#include "vec.h"

namespace moekv::cpu::MOEKV_ISA {
namespace {

inline void select_kept_kernel(const SelectKeptParams&) {}

}  // namespace
}  // namespace moekv::cpu::MOEKV_ISA
