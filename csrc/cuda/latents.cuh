// How the losses cut latents into tiles of locations, one for each block, and walk over them.
#pragma once
#include "cuda/device.cuh"

namespace star::cuda {

constexpr int LOSS_THREADS = 128;
constexpr int LOSS_WARPS = LOSS_THREADS / WARP;
constexpr int TILE = 128, SHORT_TILE = 32;  // locations of a block: at most, and where a batch has few
constexpr int FINISH_WARPS = 16;
constexpr int64_t FEW_BLOCKS = 512;  // about four for each processor: with fewer there is memory that nobody asks for
constexpr int64_t PACKED_ELEMENTS = 1024;  // of a tile

struct Tiling {
  bool packed;    // (B, L, C) instead of (B, C, H, W)
  int lanes;      // of a warp, that share one location of packed latents; a power of two
  int tile;       // locations of a block, a power of two that the shapes alone decide
  int64_t tiles;  // of a sample
};

// From the sizes and `packed`. vector: elements of an access.
template <typename Args>
void set_tiling(Args& args, int vector) {
  args.lanes = 1;
  while (args.lanes < WARP && args.lanes * vector < args.channels) args.lanes *= 2;
  args.tile = TILE;
  if (args.packed)  // a location for every group of threads at least
    while (args.tile > LOSS_THREADS / args.lanes && args.tile * args.channels > PACKED_ELEMENTS) args.tile /= 2;
  else
    while (args.tile > SHORT_TILE && args.batch * args.locations < FEW_BLOCKS * args.tile) args.tile /= 2;
  args.tiles = (args.locations + args.tile - 1) / args.tile;
}

// Calls use(fetch(offset), offset, location) for this thread's vectors of a tile: N locations of one channel, or N channels
// of one location of packed latents. A vector is fetched before the one in front of it is used, the first before begin().
// done(location) follows the last vector of the thread's locations; every thread calls it as often as the others.
template <int N, typename Args, typename Fetch, typename Begin, typename Use, typename Done>
__device__ __forceinline__ void for_each_vector(const Args& args, int64_t index, int64_t first,
                                                int length, Fetch fetch, Begin begin, Use use, Done done) {
  // Threads that read neighboring locations form groups, which share the channels. Packed: `lanes` threads share a location.
  const int thread = threadIdx.x, lanes = args.lanes, columns = args.tile / N, all_channels = int(args.channels);
  const int own_location = args.packed ? thread / lanes : thread % columns * N;
  const int own_channel = args.packed ? thread % lanes * N : thread / columns;
  const int locations = args.packed ? LOSS_THREADS / lanes : args.tile;  // of a turn
  const int channels = args.packed ? lanes * N : LOSS_THREADS / columns;
  const int location_step = args.packed ? all_channels : 1, channel_step = args.packed ? 1 : int(args.locations);
  const int64_t start = index * args.channels * args.locations + first * location_step;
  auto exists = [&](int location, int channel) { return location < length && channel < all_channels; };
  auto offset = [&](int location, int channel) {
    return start + int64_t(location) * location_step + int64_t(channel) * channel_step;
  };

  int location = own_location, channel = own_channel;
  decltype(fetch(start)) ahead{};
  if (exists(location, channel)) ahead = fetch(offset(location, channel));
  begin();
  while (location - own_location < length) {
    const auto now = ahead;
    const int here = location;
    const int64_t at = offset(location, channel);
    const bool used = exists(location, channel), last = channel - own_channel + channels >= all_channels;
    channel = last ? own_channel : channel + channels;
    location += last ? locations : 0;
    if (exists(location, channel)) ahead = fetch(offset(location, channel));
    if (used) use(now, at, here);
    if (last) done(here);
  }
}

}  // namespace star::cuda
