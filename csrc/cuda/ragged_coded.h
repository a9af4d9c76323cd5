// Attention to quantised rows.
#pragma once

#include "ragged_parts.h"

namespace moekv::cuda::ragged {

// Launches the blocks of all chunks of stored rows; there is no tail.
void attend_coded(const Arguments& arguments, Stream stream);

}  // namespace moekv::cuda::ragged
