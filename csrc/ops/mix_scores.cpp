// The edge of moekv::mix_scores: validation, allocation, dispatch.
