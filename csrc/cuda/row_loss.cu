// logits -> log-probability, entropy and dL/dlogits in the logits' own memory, with one read and one write of each row.
//
//   as row_stats, the gradient of policy_loss by logp, and logit_gradient (kernels/), whose equations these are
//
// A row is spread over the shared memory of a cluster of 8 blocks: 152,064 fp32 logits are 76 KB a block. Bulk copies bring the next row
// while this one is worked on, in stages, so that the sums begin with the first bytes. The blocks exchange (maximum, sums, target's logit)
// through distributed shared memory, once a row; then each writes the gradient of its slice. Every block has its slice on chip when the
// exchange is over: the gradient may lie where other blocks' logits were.
//
// Bytes: 4 V read and 2 V written a row (fp32 logits, bf16 gradient) where Triton's two passes move 4 V + 4 V + 2 V. The loss and its
// metrics follow from logp in a launch over [N]. gspo is not for here: its ratio needs a sequence's log-probs first.

#include <cooperative_groups.h>
#include <cuda_bf16.h>

#include "row_loss.h"

namespace cg = cooperative_groups;

namespace aot {
namespace {

constexpr int CLUSTER = 8;
constexpr int THREADS = 512;
constexpr int STAGES = 4;  // copies a slice
constexpr int SHARED_BYTES = 232448 - 1024;  // what a block may have, less what is static
constexpr float LIMIT = 20.0f;  // kernels/policy_loss.py: LOG_RATIO_LIMIT
constexpr float LOWEST = -1000.0f;  // e^z is 0 there: keeps 0 * -inf out of the entropy
constexpr float NONE = -INFINITY;

// Barriers and bulk copies

__device__ uint32_t address_of(const void* shared) { return static_cast<uint32_t>(__cvta_generic_to_shared(shared)); }

__device__ void init(uint64_t* barrier) { asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address_of(barrier)) : "memory"); }

__device__ void wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(address_of(barrier)),
      "r"(parity)
      : "memory");
}

__device__ void copy_in(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_of(barrier)), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address_of(shared)),
               "l"(global), "r"(bytes), "r"(address_of(barrier))
               : "memory");
}

// Packs of numbers: 16 bytes of logits, and the gradient of as many

template <class T>
struct Pack;

template <>
struct Pack<float> {
  static constexpr int SIZE = 4;
  float x[SIZE];
  __device__ explicit Pack(const float* p) {
    float4 v = *reinterpret_cast<const float4*>(p);
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  }
};

template <>
struct Pack<__nv_bfloat16> {
  static constexpr int SIZE = 8;
  float x[SIZE];
  __device__ explicit Pack(const __nv_bfloat16* p) {
    uint4 v = *reinterpret_cast<const uint4*>(p);
    uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      x[2 * k] = __uint_as_float(words[k] << 16);
      x[2 * k + 1] = __uint_as_float(words[k] & 0xFFFF0000u);
    }
  }
};

__device__ float to_float(float x) { return x; }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ uint32_t two_bf16(float low, float high) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&pair);
}

// Said in assembly: the compiler (13.0) takes a float4 apart into four stores here.
__device__ void put_words(void* p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

__device__ void put(float* p, const float (&x)[4]) {
  put_words(p, __float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3]));
}

__device__ void put(__nv_bfloat16* p, const float (&x)[4]) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(two_bf16(x[0], x[1])), "r"(two_bf16(x[2], x[3]))
               : "memory");
}

__device__ void put(__nv_bfloat16* p, const float (&x)[8]) {
  put_words(p, two_bf16(x[0], x[1]), two_bf16(x[2], x[3]), two_bf16(x[4], x[5]), two_bf16(x[6], x[7]));
}

// Sums over a row, to be merged: of z = (x - highest) / temperature

struct Sums {
  float highest;  // largest logit
  float weight;   // sum e^z
  float spread;   // sum e^z z
};

// The larger one; of a NaN, NaN.
__device__ float larger(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// The same sums by a higher maximum. Below LOWEST the factor is 0, and 0 times what may have overflowed is not.
__device__ void raise(Sums& s, float highest, float inverse_temperature) {
  if (s.highest == highest) return;
  float shift = (s.highest - highest) * inverse_temperature, factor = __expf(shift);
  s.spread = factor * (s.spread + fmaxf(shift, LOWEST) * s.weight);
  s.weight *= factor;
  s.highest = highest;
}

__device__ void merge(Sums& s, Sums other, float inverse_temperature) {
  float highest = larger(s.highest, other.highest);
  raise(s, highest, inverse_temperature);
  raise(other, highest, inverse_temperature);
  s.weight += other.weight;
  s.spread += other.spread;
}

template <class T>
__device__ void add(Sums& s, const Pack<T>& pack, float inverse_temperature) {
  float highest = s.highest;
#pragma unroll
  for (int k = 0; k < Pack<T>::SIZE; ++k) highest = larger(highest, pack.x[k]);
  if (highest == NONE) return;  // -inf - -inf is NaN
  raise(s, highest, inverse_temperature);
#pragma unroll
  for (int k = 0; k < Pack<T>::SIZE; ++k) {
    float z = (pack.x[k] - highest) * inverse_temperature, e = __expf(z);
    s.weight += e;
    s.spread = fmaf(e, fmaxf(z, LOWEST), s.spread);
  }
}

__device__ Sums over_the_warp(Sums s, float inverse_temperature) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
    Sums other;
    other.highest = __shfl_xor_sync(~0u, s.highest, lane);
    other.weight = __shfl_xor_sync(~0u, s.weight, lane);
    other.spread = __shfl_xor_sync(~0u, s.spread, lane);
    merge(s, other, inverse_temperature);
  }
  return s;
}

// The loss of a token: dL/dlogp

__device__ float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }  // a NaN stays one

__device__ float surrogate_slope(const RowLoss& a, float log_ratio, float advantage) {
  float ratio = expf(clamp(log_ratio, -LIMIT, LIMIT)), clipped = clamp(ratio, a.ratio_low, a.ratio_high);
  if (a.cispo) return clipped * advantage;
  float plain = ratio * advantage, bound = a.dual_clip * advantage;
  clipped *= advantage;
  bool inside = ratio >= a.ratio_low && ratio <= a.ratio_high;
  // Where both sides are equal each counts half, as in autograd.
  float slope = inside || plain < clipped ? advantage : plain == clipped ? 0.5f * advantage : 0.0f;
  float u = clipped < plain ? clipped : plain;
  if (advantage < 0) slope *= u > bound ? 1.0f : u == bound ? 0.5f : 0.0f;
  return log_ratio >= -LIMIT && log_ratio <= LIMIT ? slope * ratio : 0.0f;
}

__device__ float kl_slope(int kind, float q) {
  if (!(q >= -LIMIT && q <= LIMIT)) return 0;
  return kind == 1 ? 1.0f : kind == 2 ? -q : -expm1f(q);
}

struct RowGradient {
  float highest, log_sum, logp, entropy;
  float dlogp, dentropy;  // already over the temperature
  float at_target;        // dL/dlogit of the target, but for the entropy
  int target;             // -1: not valid
};

__device__ RowGradient gradient_of(const RowLoss& a, int row, const Sums& s, float target_logit, int target) {
  RowGradient g;
  g.highest = s.highest == NONE ? 0 : s.highest;
  g.log_sum = logf(s.weight);
  float z = (target_logit - g.highest) * a.inverse_temperature;
  bool valid = target >= 0 && z != NONE;
  g.target = valid ? target : -1;
  g.logp = valid ? z - g.log_sum : 0;
  g.entropy = valid ? g.log_sum - s.spread / s.weight : 0;
  float weight = valid ? a.weight[row] : 0;
  g.dlogp = g.dentropy = 0;
  if (weight != 0) {
    float log_ratio = g.logp - (a.old_logp ? a.old_logp[row] : g.logp);
    float slope = -surrogate_slope(a, log_ratio, a.advantages[row]);
    if (a.beta > 0) slope += a.beta * kl_slope(a.kl, a.ref_logp[row] - g.logp);
    g.dlogp = weight * slope * a.inverse_temperature;
    g.dentropy = -a.entropy_coef * weight * a.inverse_temperature;
  }
  // 1 - p of the target as -expm1(log p): p rounded before the subtraction loses the whole gradient of a likely token.
  g.at_target = -g.dlogp * expm1f(g.logp);
  return g;
}

// dL/dlogits of the packs of a slice.
template <bool WITH_ENTROPY, class In, class Out>
__device__ void write_gradient(const RowGradient& g, const In* logits, int count, int target, float inverse_temperature, Out* out) {
  for (int i = threadIdx.x * Pack<In>::SIZE; i < count; i += THREADS * Pack<In>::SIZE) {
    Pack<In> pack(logits + i);
    unsigned place = target - i;
#pragma unroll
    for (int k = 0; k < Pack<In>::SIZE; ++k) {
      float log_p = (pack.x[k] - g.highest) * inverse_temperature - g.log_sum, p = __expf(log_p);
      pack.x[k] = place == k ? g.at_target : -g.dlogp * p;
      if (WITH_ENTROPY) pack.x[k] -= g.dentropy * p * (fmaxf(log_p, LOWEST) + g.entropy);
    }
    put(out + i, pack.x);
  }
}

// The row of a masked token may be NaN, and 0 times NaN is not 0.
template <class In, class Out>
__device__ void write_zeros(int count, Out* out) {
  float zeros[Pack<In>::SIZE] = {};
  for (int i = threadIdx.x * Pack<In>::SIZE; i < count; i += THREADS * Pack<In>::SIZE) put(out + i, zeros);
}

// What the blocks of a cluster tell each other about a row.
struct Share {
  Sums sums;
  float target_logit;
};

// A block's part of a row: [first, first + count) in `STAGES` pieces.
struct Slice {
  int first, count, piece;

  __device__ Slice(int num_columns, int rank) {
    int size = slice_columns(num_columns);
    first = min(rank * size, num_columns);
    count = min(size, num_columns - first);
    piece = size / STAGES;
  }
  __device__ int piece_size(int stage) const { return max(0, min(piece, count - stage * piece)); }

  // A multiple of 16 bytes of either type in every piece.
  __host__ __device__ static int slice_columns(int num_columns) {
    constexpr int unit = 8 * STAGES * CLUSTER;
    return (num_columns + unit - 1) / unit * 8 * STAGES;
  }
};

template <class In, class Out>
__global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1) row_loss_kernel(RowLoss a, int num_buffers) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ uint64_t barriers[2][STAGES];
  __shared__ Sums of_warps[THREADS / 32];
  __shared__ Share shares[2][CLUSTER];  // by the row's parity: a slow block may still read the last row's

  cg::cluster_group cluster = cg::this_cluster();
  int rank = cluster.block_rank(), thread = threadIdx.x;
  int first_row = blockIdx.x / CLUSTER, row_step = gridDim.x / CLUSTER;
  Slice slice(a.num_columns, rank);
  In* buffers = reinterpret_cast<In*>(memory);
  int buffer_size = slice.piece * STAGES;

  auto load = [&](int row, int buffer) {  // one thread
    const In* source = static_cast<const In*>(a.logits) + row * a.row_stride + slice.first;
    for (int stage = 0; stage < STAGES; ++stage)
      if (int size = slice.piece_size(stage))
        copy_in(buffers + buffer * buffer_size + stage * slice.piece, source + stage * slice.piece, size * sizeof(In),
                &barriers[buffer][stage]);
  };

  if (thread == 0) {
    for (int k = 0; k < 2 * STAGES; ++k) init(&barriers[k / STAGES][k % STAGES]);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    for (int k = 0; k < num_buffers; ++k)
      if (first_row + k * row_step < a.num_rows) load(first_row + k * row_step, k);
  }
  cluster.sync();  // every block exists, and may be written to

  for (int turn = 0, row = first_row; row < a.num_rows; ++turn, row += row_step) {
    int buffer = turn % num_buffers;
    uint32_t parity = turn / num_buffers & 1;
    const In* logits = buffers + buffer * buffer_size;

    Sums sums{NONE, 0, 0};
    for (int stage = 0, i = thread * Pack<In>::SIZE; stage * slice.piece < slice.count; ++stage) {
      int end = min((stage + 1) * slice.piece, slice.count);
      wait(&barriers[buffer][stage], parity);
      for (; i < end; i += THREADS * Pack<In>::SIZE) add(sums, Pack<In>(logits + i), a.inverse_temperature);
    }
    sums = over_the_warp(sums, a.inverse_temperature);
    if (thread % 32 == 0) of_warps[thread / 32] = sums;
    __syncthreads();
    if (thread < CLUSTER) {
      Share own{of_warps[0], NONE};
      for (int k = 1; k < THREADS / 32; ++k) merge(own.sums, of_warps[k], a.inverse_temperature);
      int64_t place = a.targets[row] - slice.first;
      if (place >= 0 && place < slice.count) own.target_logit = to_float(logits[place]);
      *cluster.map_shared_rank(&shares[turn & 1][rank], thread) = own;
    }
    cluster.sync();  // every block has its slice on chip, and all shares

    Share total = shares[turn & 1][0];
    for (int k = 1; k < CLUSTER; ++k) merge(total.sums, shares[turn & 1][k].sums, a.inverse_temperature);
    int64_t wanted = a.targets[row];
    int target = wanted >= 0 && wanted < a.num_columns ? static_cast<int>(wanted) : -1;
    if (target >= 0) total.target_logit = shares[turn & 1][target / Slice::slice_columns(a.num_columns)].target_logit;
    RowGradient g = gradient_of(a, row, total.sums, total.target_logit, target);
    if (rank == 0 && thread == 0) {
      a.logp[row] = g.logp;
      a.entropy[row] = g.entropy;
      a.valid[row] = g.target >= 0;
    }

    Out* out = reinterpret_cast<Out*>(static_cast<In*>(a.logits) + row * a.row_stride) + slice.first;
    int place = g.target - slice.first;
    if (g.dlogp == 0 && g.dentropy == 0)
      write_zeros<In>(slice.count, out);
    else if (g.dentropy == 0)
      write_gradient<false>(g, logits, slice.count, place, a.inverse_temperature, out);
    else
      write_gradient<true>(g, logits, slice.count, place, a.inverse_temperature, out);
    __syncthreads();  // the buffer has been read
    if (thread == 0 && row + num_buffers * row_step < a.num_rows) load(row + num_buffers * row_step, buffer);
  }
  cluster.sync();  // no block may end while others still write into its shares
}

size_t buffer_bytes(int num_columns, Number logits) {
  return static_cast<size_t>(Slice::slice_columns(num_columns)) * (logits == Number::fp32 ? 4 : 2);
}

template <class In, class Out>
cudaError_t launch(const RowLoss& a, Number logits, cudaStream_t stream) {
  size_t bytes = buffer_bytes(a.num_columns, logits);
  int num_buffers = 2 * bytes <= SHARED_BYTES ? 2 : 1, resident = 0;
  cudaError_t error = cudaFuncSetAttribute(row_loss_kernel<In, Out>, cudaFuncAttributeMaxDynamicSharedMemorySize, num_buffers * bytes);
  // A cluster lives inside one of the chip's uneven parts: fewer fit than multiprocessors / 8, and one too many would start when the others end.
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute shape;
  shape.id = cudaLaunchAttributeClusterDimension;
  shape.val.clusterDim = {CLUSTER, 1, 1};
  config.gridDim = CLUSTER, config.blockDim = THREADS, config.dynamicSmemBytes = num_buffers * bytes;
  config.stream = stream, config.attrs = &shape, config.numAttrs = 1;
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&resident, row_loss_kernel<In, Out>, &config);
  if (error == cudaSuccess && resident == 0) error = cudaErrorLaunchOutOfResources;
  if (error != cudaSuccess) return error;
  int clusters = min(a.num_rows, resident);
  row_loss_kernel<In, Out><<<clusters * CLUSTER, THREADS, num_buffers * bytes, stream>>>(a, num_buffers);
  return cudaGetLastError();
}

}  // namespace

bool fits_row_loss(int num_columns, int64_t row_stride, Number logits) {
  int unit = logits == Number::fp32 ? 4 : 8;  // 16 bytes
  return num_columns > 0 && num_columns % 8 == 0 && row_stride % unit == 0 && buffer_bytes(num_columns, logits) <= SHARED_BYTES;
}

cudaError_t launch_row_loss(const RowLoss& a, Number logits, Number gradient, cudaStream_t stream) {
  if (a.num_rows == 0) return cudaSuccess;
  if (logits == Number::bf16) return gradient == Number::bf16 ? launch<__nv_bfloat16, __nv_bfloat16>(a, logits, stream) : cudaErrorInvalidValue;
  return gradient == Number::bf16 ? launch<float, __nv_bfloat16>(a, logits, stream) : launch<float, float>(a, logits, stream);
}

}  // namespace aot
