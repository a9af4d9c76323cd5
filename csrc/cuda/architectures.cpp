// Lets `moekv info` find out from the file what it was compiled for: the library loads only beside
// a CUDA build of torch.
namespace {
[[gnu::used]] constexpr char kArchitectures[] =
    "moekv-cuda-architectures=" MOEKV_CUDA_ARCHITECTURES;
}
