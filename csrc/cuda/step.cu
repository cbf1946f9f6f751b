// The ends of a step: begin_step turns what the host sends into the inputs of the forward pass and of sampling, end_step hands the
// sampled tokens on to the next step and to the host. Neither knows models or requests.
//
// The host sends one array of 32-bit words, `staging`; worker/staging.py packs it and describes the same layout:
//
//     header [16]   N sequences, T tokens, S samples, A runs, W blocks, L last tokens, P parameters, result slot
//     row, start, count [N] each, query_start [N + 1]      what each sequence computes
//     ids [T]                                              token ids; -1: the row's last token, which only the device knows
//     runs [A, 4], blocks [W]                              (row, index, length, offset): blocks that are appended to block tables
//     last [L, 2]                                          (row, token): a row's last token, chosen by the host
//     parameters [P, 9]                                    (row, temperature, top_k, top_p, min_p, seed low, seed high, index, 0)
//     samples [S], sources [S], places [S]                 row, token whose hidden state is read, index that the new token gets
//
// Invariant: one thread block does it all, changes first, then what depends on them; tensors are filled to their end, so that what
// lies beyond N, T and S is padding that writes nowhere: id -1, slot -1, context 0, row -1.
#include "common/check.h"
#include "launch.h"
#include "ops.h"

namespace octavo::cuda {
namespace {

constexpr int threads = 1024;
constexpr int header_words = 16;
constexpr int parameter_words = 8;
enum Header { num_seqs, num_tokens, num_samples, num_runs, num_blocks, num_last, num_parameters, slot_of_result };

struct Step {
  const int* staging;
  int* block_tables;  // [R, M], rows table_stride apart
  int* last_token;    // [R]
  int* parameters;    // [R, 8]
  int64_t* ids;       // [tokens]
  int64_t* positions;
  int64_t* slots;
  int* rows;           // [seqs]
  int* query_start;    // [seqs + 1]
  int* context_len;    // [seqs]
  int* sample_ints;    // [5, R]: row, source, place, top_k, index
  float* sample_floats;  // [3, R]: temperature, top_p, min_p
  int64_t* sample_seeds;  // [R]
  int* result_slot;       // [1]
  int64_t table_stride;
  int tokens, seqs, num_rows, block_size;
};

__global__ void __launch_bounds__(threads) begin(Step p) {
  dependency_wait();
  dependents_start();
  const int* h = p.staging;
  const int n = h[num_seqs], t_used = h[num_tokens], s_used = h[num_samples], a = h[num_runs], w = h[num_blocks];
  const int l = h[num_last], changed = h[num_parameters];
  const int* row = h + header_words;
  const int* start = row + n;
  const int* count = start + n;
  const int* first = count + n;  // query_start, n + 1
  const int* ids = first + n + 1;
  const int* runs = ids + t_used;
  const int* blocks = runs + 4 * a;
  const int* last = blocks + w;
  const int* parameters = last + 2 * l;
  const int* samples = parameters + (1 + parameter_words) * changed;
  const int* sources = samples + s_used;
  const int* places = sources + s_used;
  const int tid = threadIdx.x, lane = tid % 32;

  for (int i = tid / 32; i < a; i += threads / 32) {
    const int length = runs[4 * i + 2];
    int* to = p.block_tables + runs[4 * i] * p.table_stride + runs[4 * i + 1];
    for (int j = lane; j < length; j += 32) to[j] = blocks[runs[4 * i + 3] + j];
  }
  for (int i = tid; i < l; i += threads) p.last_token[last[2 * i]] = last[2 * i + 1];
  for (int i = tid; i < changed * parameter_words; i += threads) {
    const int* from = parameters + (1 + parameter_words) * (i / parameter_words);
    p.parameters[static_cast<int64_t>(from[0]) * parameter_words + i % parameter_words] = from[1 + i % parameter_words];
  }
  if (tid == 0) *p.result_slot = h[slot_of_result];
  __syncthreads();

  for (int i = tid; i < p.seqs; i += threads) {
    const bool used = i < n;
    p.rows[i] = used ? row[i] : 0;
    p.query_start[i] = used ? first[i] : t_used;
    p.context_len[i] = used ? start[i] + count[i] : 0;
  }
  if (tid == 0) p.query_start[p.seqs] = t_used;

  for (int t = tid; t < p.tokens; t += threads) {
    int64_t id = -1, position = 0, slot = -1;
    if (t < t_used) {
      int s = t;
      if (n != t_used) {  // the last sequence that begins at or before t; none is empty
        int low = 0, high = n;
        while (high - low > 1) {
          const int middle = (low + high) / 2;
          if (first[middle] <= t)
            low = middle;
          else
            high = middle;
        }
        s = low;
      }
      const int r = row[s];
      position = start[s] + t - first[s];
      const int64_t block = p.block_tables[r * p.table_stride + position / p.block_size];
      slot = block * p.block_size + position % p.block_size;
      id = ids[t] >= 0 ? ids[t] : p.last_token[r];
    }
    p.ids[t] = id;
    p.positions[t] = position;
    p.slots[t] = slot;
  }

  for (int j = tid; j < p.num_rows; j += threads) {
    const bool used = j < s_used;
    const int r = used ? samples[j] : -1;
    const int* own = p.parameters + static_cast<int64_t>(r < 0 ? 0 : r) * parameter_words;
    p.sample_ints[j] = r;
    p.sample_ints[j + p.num_rows] = used ? sources[j] : 0;
    p.sample_ints[j + 2 * p.num_rows] = used ? places[j] : 0;
    p.sample_ints[j + 3 * p.num_rows] = r >= 0 ? own[1] : 0;
    p.sample_ints[j + 4 * p.num_rows] = r >= 0 ? own[6] : 0;
    p.sample_floats[j] = r >= 0 ? __int_as_float(own[0]) : 0.0f;
    p.sample_floats[j + p.num_rows] = r >= 0 ? __int_as_float(own[2]) : 1.0f;
    p.sample_floats[j + 2 * p.num_rows] = r >= 0 ? __int_as_float(own[3]) : 0.0f;
    const uint64_t seed = static_cast<uint32_t>(own[4]) | static_cast<uint64_t>(static_cast<uint32_t>(own[5])) << 32;
    p.sample_seeds[j] = r >= 0 ? static_cast<int64_t>(seed) : 0;
  }
}

__global__ void end(const int* __restrict__ tokens,   // [S]
                    const int* __restrict__ samples,  // [S], -1: padding, or a row that the host continues
                    int* last_token,                  // [R]
                    int* results,                     // [slots, R] in pinned host memory
                    const int* result_slot, int num_samples, int num_rows) {
  dependency_wait();
  dependents_start();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= num_samples) return;
  const int token = tokens[i], row = samples[i];
  if (row >= 0) last_token[row] = token < 0 ? 0 : token;
  results[static_cast<int64_t>(*result_slot) * num_rows + i] = token;
}

}  // namespace

void begin_step(const Tensor& staging, const Tensor& block_tables, const Tensor& last_token, const Tensor& parameters, const Tensor& ids,
                const Tensor& positions, const Tensor& slots, const Tensor& rows_out, const Tensor& query_start, const Tensor& context_len,
                const Tensor& sample_ints, const Tensor& sample_floats, const Tensor& sample_seeds, const Tensor& result_slot,
                int64_t block_size) {
  Contract c("begin_step");
  c.tensor("staging", staging, "X", i32);
  c.tensor("block_tables", block_tables, "RM", i32, rows);
  c.tensor("last_token", last_token, "R", i32);
  c.tensor("parameters", parameters, "R8", i32);
  c.tensor("ids", ids, "T", i64);
  c.tensor("positions", positions, "T", i64);
  c.tensor("slots", slots, "T", i64);
  c.tensor("rows", rows_out, "N", i32);
  c.tensor("query_start", query_start, "U", i32);
  c.tensor("context_len", context_len, "N", i32);
  c.tensor("sample_ints", sample_ints, "5R", i32);
  c.tensor("sample_floats", sample_floats, "3R", f32);
  c.tensor("sample_seeds", sample_seeds, "R", i64);
  c.tensor("result_slot", result_slot, "1", i32);
  c.require(c['U'] == c['N'] + 1, "query_start has %lld entries for %lld sequences, expected one more", static_cast<long long>(c['U']),
            static_cast<long long>(c['N']));
  c.require(c['X'] >= header_words, "staging has %lld words, fewer than its header", static_cast<long long>(c['X']));
  c.require(block_size > 0, "block_size = %lld", static_cast<long long>(block_size));
  Step p = {};
  p.staging = staging.ptr<const int>();
  p.block_tables = block_tables.ptr<int>();
  p.last_token = last_token.ptr<int>();
  p.parameters = parameters.ptr<int>();
  p.ids = ids.ptr<int64_t>();
  p.positions = positions.ptr<int64_t>();
  p.slots = slots.ptr<int64_t>();
  p.rows = rows_out.ptr<int>();
  p.query_start = query_start.ptr<int>();
  p.context_len = context_len.ptr<int>();
  p.sample_ints = sample_ints.ptr<int>();
  p.sample_floats = sample_floats.ptr<float>();
  p.sample_seeds = sample_seeds.ptr<int64_t>();
  p.result_slot = result_slot.ptr<int>();
  p.table_stride = block_tables.stride[0];
  p.tokens = static_cast<int>(c['T']);
  p.seqs = static_cast<int>(c['N']);
  p.num_rows = static_cast<int>(c['R']);
  p.block_size = static_cast<int>(block_size);
  launch("begin_step", begin, 1, threads, 0, current_stream(), p);
}

void end_step(const Tensor& tokens, const Tensor& samples, const Tensor& last_token, const Tensor& results, const Tensor& result_slot) {
  Contract c("end_step");
  c.tensor("tokens", tokens, "S", i32);
  c.tensor("samples", samples, "S", i32);
  c.tensor("last_token", last_token, "R", i32);
  c.tensor("results", results, "KR", i32);
  c.tensor("result_slot", result_slot, "1", i32);
  c.require(c['S'] <= c['R'], "%lld samples do not fit %lld rows", static_cast<long long>(c['S']), static_cast<long long>(c['R']));
  if (c['S'] == 0) return;
  constexpr int block = 256;
  const int num = static_cast<int>(c['S']);
  launch("end_step", end, (num + block - 1) / block, block, 0, current_stream(), tokens.ptr<const int>(), samples.ptr<const int>(),
         last_token.ptr<int>(), results.ptr<int>(), result_slot.ptr<const int>(), num, static_cast<int>(c['R']));
}

}  // namespace octavo::cuda
