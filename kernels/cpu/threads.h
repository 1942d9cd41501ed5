// How the CPU's operators divide work among threads; included by operators.cpp. A thread that runs steps (`in_a_team`)
// leads a team. Its followers poll for work; until it comes, each prefetches into its core's cache the start of its
// share of the weights that came next in the last step, as memory would be idle between products. On two threads that
// makes decoding 2 % faster with 1.1B weights in int8, 5 % with 135M in bf16.
//
// On a busy machine a thread may stand still for milliseconds. So nobody waits for one that has not begun: the leader
// can do all of a call's work itself, and in the end waits only for the followers that are inside the call (OpenMP's
// threads all meet in a barrier). A follower that is held up for more than a sixteenth of its time rests, longer each
// time, because it takes time from the leader.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <unordered_map>
#include <vector>

namespace {

constexpr int64_t AHEAD = 1 << 20;        // bytes that a thread prefetches: what a core's own cache holds
constexpr int64_t MAX_CHOSEN = 16;        // experts; more are not prefetched
constexpr int64_t AT_ONCE = 1 << 10;      // bytes: of more prefetches at a time, the processor drops some
constexpr int64_t SLEEP_AFTER = 1 << 16;  // polls, a few milliseconds, before a follower sleeps until it is called
constexpr int64_t LATE_AFTER = 1000;      // polls, some 20 microseconds, after which the leader calls followers late
constexpr int64_t HELD_UP = 200'000;      // nanoseconds; no wait takes so long unless another program has the core
constexpr int64_t LONGEST_REST = 1'000'000'000;

// The parts of `Team::state`: the call's number, whether it is closed, how many followers entered it and are inside.
constexpr uint32_t CALL = 1 << 21, CLOSED = 1 << 20, ENTERED = 1 << 10, INSIDE = 1;

struct Weights {
  const uint8_t* begin = nullptr;
  int64_t bytes = 0;              // of all, or of one expert
  const Weights* next = nullptr;  // what was multiplied after them last time
  bool of_experts = false;
  int64_t n_chosen = 1;
  int64_t chosen[MAX_CHOSEN] = {0};  // the experts

  int64_t end() const { return n_chosen * bytes; }
  const uint8_t* at(int64_t i) const { return begin + chosen[i / bytes] * bytes + i % bytes; }
};

struct Team {
  const int64_t size;  // threads; the leader is thread 0
  std::atomic<uint32_t> state{CLOSED};
  std::atomic<int64_t> late_since{0};            // nanoseconds; 0: no follower is late
  std::atomic<bool> polls{false};                // else followers sleep at once: PyTorch's threads use the cores
  void (*work)(const void*, int64_t) = nullptr;  // of the call; without it, followers end
  const void* argument = nullptr;
  Weights ahead;                                      // to prefetch; changes between calls, followers copy it inside
  std::unordered_map<const uint8_t*, Weights> known;  // by their first byte; they may have been freed since
  Weights* last = nullptr;                            // the weights multiplied last

  explicit Team(int64_t size) : size(size) {}

  void multiplies(const at::Tensor& packed, int64_t bytes, const int64_t* experts = nullptr, int64_t n_chosen = 1) {
    const auto* begin = static_cast<const uint8_t*>(packed.const_data_ptr());
    Weights& now = known[begin];
    now.begin = begin, now.bytes = bytes, now.of_experts = experts, now.n_chosen = n_chosen <= MAX_CHOSEN ? n_chosen : 0;
    if (experts) std::copy_n(experts, now.n_chosen, now.chosen);
    if (last) last->next = &now;
    last = &now;
    ahead = now.next ? *now.next : Weights{};
    if (ahead.of_experts) {  // those of this token, if they are known
      ahead.n_chosen = experts ? now.n_chosen : 0;
      std::copy_n(now.chosen, ahead.n_chosen, ahead.chosen);
    }
  }

  void open(void (*run)(const void*, int64_t), const void* with) {
    work = run, argument = with;
    state = (state / CALL + 1) * CALL;
    state.notify_all();
  }
};

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

int64_t nanoseconds() { return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// The loop of follower t: it works on a call, else prefetches, else polls, and in the end sleeps. `looked` is when it
// last ran for certain, `began` the end of its last rest.
void follow(const std::shared_ptr<Team>& team, int64_t t) {
  Weights ahead;
  uint32_t seen = 0;
  int64_t n_read = 0, n_looks = 0, looked = nanoseconds(), began = looked, rest = 0;
  for (;;) {
    const int64_t from = ahead.end() * t / team->size + n_read;  // from the start of the thread's own share
    if (uint32_t state = team->state; state / CALL != seen && !(state & CLOSED)) {
      if (!team->state.compare_exchange_weak(state, state + ENTERED + INSIDE)) continue;
      if (!team->work) return;
      team->work(team->argument, t);
      ahead = team->ahead, n_read = n_looks = 0, seen = state / CALL;
      const int64_t late_since = team->late_since;
      team->state -= INSIDE;
      looked = late_since ? late_since : nanoseconds();
    } else if (n_read < AHEAD && from + AT_ONCE <= ahead.end()) {
      for (int64_t i = 0; i < AT_ONCE; i += 64) __builtin_prefetch(ahead.at(from) + i);  // no fault if freed
      n_read += AT_ONCE;
    } else if (++n_looks < SLEEP_AFTER && team->polls) {
      pause();
    } else {
      team->state.wait(state);
      looked = nanoseconds();
    }
    const int64_t now = nanoseconds(), held_up = now - looked;
    looked = now;
    if (held_up < HELD_UP) continue;
    rest = now - began < 16 * held_up ? std::min(std::max(4 * rest, held_up), LONGEST_REST) : rest / 4;
    std::this_thread::sleep_for(std::chrono::nanoseconds(rest));
    looked = began = nanoseconds();
  }
}

struct Leader {
  std::shared_ptr<Team> team;
  bool in_step = false;

  ~Leader() { dismiss(); }

  void dismiss() {
    if (team) team->open(nullptr, nullptr);
  }

  void gather(int64_t size) {
    if (team && team->size == size) return;
    dismiss();
    team = std::make_shared<Team>(size);
    for (int64_t t = 1; t < size; ++t) std::thread(follow, team, t).detach();
  }

  // Calls `run(0)` here and, in the followers that come before it returns, `run(t)` for t > 0.
  template <class Run>
  void call(const Run& run) {
    team->open([](const void* argument, int64_t t) { (*static_cast<const Run*>(argument))(t); }, &run);
    run(0);
    int64_t n_looks = 0;
    for (;; pause()) {
      uint32_t state = team->state;
      const bool all_came = state / ENTERED % ENTERED == team->size - 1;
      if (state % ENTERED == 0 && (all_came || team->state.compare_exchange_weak(state, state | CLOSED))) break;
      if (++n_looks == LATE_AFTER) team->late_since = nanoseconds();
    }
    if (n_looks >= LATE_AFTER) team->late_since = 0;
  }
};

thread_local Leader leader;

// Calls `work(i)` for every i below n in parallel. Each thread goes through a range of its own in order; one that is
// done steals the second half of what another has left, because cores are never equally fast. With 1.1B weights on two
// threads, a token takes 6 % less time than with equal shares in bf16 and int8, 2 % less in int4.
template <class Work>
void share_out(int64_t n, const Work& work) {
  struct alignas(64) Range {
    std::atomic<uint64_t> bounds;
  };
  const auto pack = [](uint64_t first, uint64_t end) { return first << 32 | end; };
  const int64_t n_threads = std::min<int64_t>(n, at::get_num_threads());
  std::vector<Range> ranges(n_threads);
  for (int64_t t = 0; t < n_threads; ++t) ranges[t].bounds = pack(n * t / n_threads, n * (t + 1) / n_threads);
  const auto run = [&](int64_t t) {
    for (int64_t from = t; t < n_threads && from < t + n_threads;) {
      std::atomic<uint64_t>& bounds = ranges[from % n_threads].bounds;
      uint64_t seen = bounds;
      const uint64_t first = seen >> 32, end = uint32_t(seen);
      if (first == end) {
        ++from;
      } else if (from == t) {
        if (bounds.compare_exchange_weak(seen, pack(first + 1, end))) work(int64_t(first));
      } else if (const uint64_t middle = (first + end) / 2; bounds.compare_exchange_weak(seen, pack(first, middle))) {
        ranges[t].bounds = pack(middle, end);
        from = t;
      }
    }
  };
  if (leader.in_step) return leader.call(run);
  if (leader.team) leader.team->polls = false;
  at::parallel_for(0, n_threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) run(t);
  });
}

}  // namespace

// Runs `step()` as the leader of a team; inside, PyTorch's own operators run on one thread. PyTorch's threads that are
// still polling end here, as they would share the followers' cores.
extern "C" __attribute__((visibility("default"))) void in_a_team(void (*step)()) {
  if (leader.in_step || at::get_num_threads() == 1) return step();
  leader.gather(std::min<int64_t>(at::get_num_threads(), ENTERED));
  if (!leader.team->polls.exchange(true)) omp_pause_resource_all(omp_pause_soft);
  const int levels = omp_get_max_active_levels();
  omp_set_max_active_levels(0);
  leader.in_step = true;
  step();
  leader.in_step = false;
  omp_set_max_active_levels(levels);
}
