// The edge of moekv::kv_compact: validation, allocation, dispatch.
