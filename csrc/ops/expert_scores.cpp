// The edge of moekv::expert_scores: validation, allocation, dispatch.
