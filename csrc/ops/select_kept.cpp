// The edge of moekv::select_kept: validation, allocation, dispatch.
