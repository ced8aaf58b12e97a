// The scheduler behind runtime.h.
#include "runtime.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <new>

#include "fiber.h"

namespace fusedrnn::cuda::host {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif
constexpr int kBarriers = 16;

// Stacks are kept from launch to launch; a page of one costs nothing until it is touched.
class Stacks {
 public:
  Stack at(size_t n) {
    while (n >= stacks_.size()) {
      void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      stacks_.push_back({static_cast<char*>(memory), kStackBytes});
    }
    forget(stacks_[n]);
    return stacks_[n];
  }

 private:
  std::vector<Stack> stacks_;
};

// xorshift64*, seeded by splitmix64 so that neighbouring seeds have nothing in common.
class Random {
 public:
  explicit Random(uint64_t seed) {
    uint64_t z = seed + 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    state_ = (z ^ (z >> 31)) | 1;
  }
  uint32_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return static_cast<uint32_t>((state_ * 0x2545f4914f6cdd1du) >> 32);
  }
  uint32_t below(size_t n) { return static_cast<uint32_t>((uint64_t{next()} * n) >> 32); }

 private:
  uint64_t state_;
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  uint32_t group;  // of its thread
};

struct Store {
  void* to;
  std::array<char, 16> value;
  int bytes;
  int thread;   // of its block
  bool synced;  // its thread has passed a barrier of the block since
};

struct Push {
  int block;  // whose shared memory it is for
  void* to;
  std::array<char, 16> value;
  int bytes;
  void* barrier;
  void (*completed)(void*, int);
};

struct Thread {
  Fiber fiber;
  int block, index;
  const char* waits_for = nullptr;
  bool (*ready)(void*) = nullptr;  // polled, unless null: then another thread wakes it
  void* ready_argument = nullptr;
  std::vector<Copy> copies;
  uint32_t group = 0;  // that copies of now will be in
};

struct Barrier {
  int arrived = 0, count = 0;
  std::vector<Thread*> waiting;
};

struct Warp {
  WarpOperation operation = nullptr;
  int arrived = 0;
  std::array<const void*, kWarp> in;
  std::array<void*, kWarp> out;
  std::array<Thread*, kWarp> threads;
};

struct FreeMemory {
  void operator()(char* memory) const { std::free(memory); }
};

struct Block {
  int alive;  // threads
  std::unique_ptr<char, FreeMemory> shared;
  std::array<Barrier, kBarriers> barriers;
  std::vector<Warp> warps;
  std::vector<Store> stores;
};

// Draws the next of some candidates so that some blocks and some warps are slow for a while: with every thread equally
// fast, no block would ever be a step ahead of another.
class Speeds {
 public:
  Speeds(Random& random, int blocks, int warps)
      : random_(random), block_(blocks), warp_(blocks * warps), warps_(warps) {
    draw();
  }
  size_t pick(const std::vector<Thread*>& candidates) {
    if (--left_ == 0) draw();
    size_t choice = 0;
    for (int attempt = 0; attempt < 8; ++attempt) {
      choice = random_.below(candidates.size());
      const Thread& thread = *candidates[choice];
      const uint32_t slow = block_[thread.block] + warp_[thread.block * warps_ + thread.index / kWarp];
      if (slow == 0 || random_.next() % (1u << (4 * slow)) == 0) break;
    }
    return choice;
  }

 private:
  void draw() {
    left_ = 500 + random_.below(3000);
    const uint32_t share = random_.below(4);  // in this period 0, 1/4, 2/4 or 3/4 are slow
    for (auto& slow : block_) slow = random_.below(4) < share;
    for (auto& slow : warp_) slow = random_.below(4) < share;
  }

  Random& random_;
  std::vector<uint8_t> block_, warp_;
  int warps_, left_ = 1;
};

class Machine {
 public:
  Machine(const Launch& launch, void (*body)(const void*, char*), const void* argument)
      : launch_(launch),
        body_(body),
        argument_(argument),
        random_(launch.seed),
        speeds_(random_, launch.blocks, launch.threads / kWarp),
        threads_(static_cast<size_t>(launch.blocks) * launch.threads),
        blocks_(launch.blocks),
        clusters_(launch.blocks / launch.cluster),
        // From eager to as late as can be.
        laziness_(std::array<uint32_t, 4>{2, 16, 256, 0}[random_.below(4)]) {}

  Report run();
  void finish();                // the fiber that runs has ended
  void park(const char* name);  // it waits for another to wake it
  void wake(Thread& thread) { runnable_.push_back(&thread); }
  bool present(const char* name);
  void release(Block& block, int thread);

  const Launch& launch_;
  void (*body_)(const void*, char*);
  const void* argument_;
  Random random_;
  Speeds speeds_;
  std::vector<Thread> threads_;
  std::vector<Block> blocks_;
  std::vector<Barrier> clusters_;
  uint32_t laziness_;
  std::vector<Thread*> runnable_, polling_;
  std::vector<Thread*> not_begun_;  // of a block that begins when no other can go on
  std::vector<Push> pushes_;
  std::vector<std::pair<const char*, bool>> names_;  // and whether it is present
  Fiber scheduler_;
  Thread* current_ = nullptr;
  size_t alive_ = 0;
  uint64_t switches_ = 0;
  std::string error_;

 private:
  void start();
  void resume(Thread& thread);
  bool poll(bool all);
  bool something_late();
  void complete_push();
  std::string deadlock() const;
};

Machine* machine = nullptr;
Stacks stacks;

void run_fiber() {
  arrived(machine->current_->fiber, &machine->scheduler_);
  machine->body_(machine->argument_, machine->blocks_[machine->current_->block].shared.get());
  machine->finish();
}

void Machine::start() {
  for (Block& block : blocks_) {
    // Sized to the byte, for AddressSanitizer; what is never written is a NaN in every dtype.
    const size_t bytes = std::max<size_t>(launch_.shared_bytes, 16);
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, bytes) != 0) throw std::bad_alloc();
    block.shared.reset(static_cast<char*>(memory));
    std::memset(memory, 0xff, bytes);
    block.alive = launch_.threads;
    block.warps.resize(launch_.threads / kWarp);
  }
  for (size_t n = 0; n < threads_.size(); ++n) {
    Thread& thread = threads_[n];
    thread.block = static_cast<int>(n / launch_.threads);
    thread.index = static_cast<int>(n % launch_.threads);
    thread.fiber.stack = stacks.at(n);
    prepare(thread.fiber.context, thread.fiber.stack, run_fiber);
    const bool begins_late =
        launch_.seed % 4 == 1 && launch_.seed / 4 % blocks_.size() == static_cast<size_t>(thread.block);
    (begins_late ? not_begun_ : runnable_).push_back(&thread);
  }
  alive_ = threads_.size();
}

Report Machine::run() {
  start();
  while (alive_ > 0 && error_.empty()) {
    if (laziness_ != 0 && random_.next() % laziness_ == 0) something_late();
    if (!polling_.empty() && (random_.next() & 15) == 0) poll(false);
    if (runnable_.empty()) {
      if (poll(true) || something_late() || !error_.empty()) continue;
      if (!not_begun_.empty()) {
        runnable_.swap(not_begun_);
        continue;
      }
      error_ = deadlock();
      break;
    }
    const size_t choice = speeds_.pick(runnable_);
    Thread& next = *runnable_[choice];
    runnable_[choice] = runnable_.back();
    runnable_.pop_back();
    resume(next);
  }
  while (error_.empty() && something_late()) {
  }
  Report report{error_, {}, switches_};
  for (const auto& [name, is_present] : names_) report.names.emplace_back(name);
  return report;
}

void Machine::resume(Thread& thread) {
  ++switches_;
  current_ = &thread;
  switch_fiber(scheduler_, thread.fiber);
  current_ = nullptr;
}

void Machine::finish() {
  // What depends on a synchronisation that is not there is seen in the results, and to be found there.
  if (!current_->copies.empty() && launch_.remove == nullptr) fail("it ends, and copies of it do not");
  --blocks_[current_->block].alive;
  --alive_;
  switch_fiber(current_->fiber, scheduler_, true);
}

void Machine::park(const char* name) {
  Thread& thread = *current_;
  thread.waits_for = name;
  switch_fiber(thread.fiber, scheduler_);
  thread.waits_for = nullptr;
}

// Wakes one polling thread whose condition holds, or every such thread.
bool Machine::poll(bool all) {
  bool woken = false;
  const size_t tries = all ? polling_.size() : 1;
  size_t k = all ? 0 : random_.below(polling_.size());
  for (size_t n = 0; n < tries; ++n) {
    Thread* thread = polling_[k];
    if (!thread->ready(thread->ready_argument)) {
      ++k;
      continue;
    }
    polling_[k] = polling_.back();
    polling_.pop_back();
    wake(*thread);
    woken = true;
  }
  return woken;
}

// Lets one thing that is late happen.
bool Machine::something_late() {
  if (!pushes_.empty() && (random_.next() & 1) != 0) {
    complete_push();
    return true;
  }
  const size_t first = random_.below(blocks_.size());
  for (size_t n = 0; n < blocks_.size(); ++n) {
    auto& stores = blocks_[(first + n) % blocks_.size()].stores;
    if (stores.empty()) continue;
    const size_t k = random_.below(stores.size());
    std::memcpy(stores[k].to, stores[k].value.data(), stores[k].bytes);
    stores[k] = stores.back();
    stores.pop_back();
    return true;
  }
  if (pushes_.empty()) return false;
  complete_push();
  return true;
}

void Machine::complete_push() {
  const size_t k = random_.below(pushes_.size());
  const Push push = pushes_[k];
  pushes_[k] = pushes_.back();
  pushes_.pop_back();
  if (blocks_[push.block].alive == 0 && launch_.remove == nullptr) {
    error_ = "block " + std::to_string(push.block) + " has ended before what is pushed to it has come";
  }
  std::memcpy(push.to, push.value.data(), push.bytes);
  push.completed(push.barrier, push.bytes);
}

bool Machine::present(const char* name) {
  for (const auto& [known, is_present] : names_) {
    if (known == name) return is_present;
  }
  for (const auto& [known, is_present] : names_) {  // the same name from another place
    if (std::strcmp(known, name) == 0) return is_present;
  }
  names_.emplace_back(name, launch_.remove == nullptr || std::strcmp(launch_.remove, name) != 0);
  return names_.back().second;
}

void Machine::release(Block& block, int thread) {
  auto kept = block.stores.begin();
  for (Store& store : block.stores) {
    if (store.synced || store.thread == thread) {
      std::memcpy(store.to, store.value.data(), store.bytes);
    } else {
      *kept++ = store;
    }
  }
  block.stores.erase(kept, block.stores.end());
}

std::string Machine::deadlock() const {
  std::string text = "deadlock: no thread can run";
  size_t begin = 0;
  const auto waiting = [&](size_t n) -> const char* { return threads_[n].waits_for; };
  while (begin < threads_.size()) {
    size_t end = begin + 1;
    const auto same = [&] {
      const char *a = waiting(begin), *b = waiting(end);
      return threads_[end].block == threads_[begin].block && (a == b || (a && b && std::strcmp(a, b) == 0));
    };
    while (end < threads_.size() && same()) ++end;
    if (waiting(begin) != nullptr) {
      text += "\n  block " + std::to_string(threads_[begin].block) + ", threads " +
              std::to_string(threads_[begin].index) + " to " + std::to_string(threads_[end - 1].index) +
              ": waiting at '" + waiting(begin) + "'";
    }
    begin = end;
  }
  return text;
}

void barrier_wait(Barrier& barrier, int count, const char* name) {
  if (barrier.arrived == 0) barrier.count = count;
  if (barrier.count != count) fail(std::string("threads disagree how many wait at '") + name + "'");
  if (++barrier.arrived < count) {
    barrier.waiting.push_back(machine->current_);
    machine->park(name);
    return;
  }
  barrier.arrived = 0;
  for (Thread* thread : barrier.waiting) machine->wake(*thread);
  barrier.waiting.clear();
  machine->wake(*machine->current_);  // the last to arrive has no advantage
  machine->park(name);
}

void mark_synced(Block& block, int first_thread, int threads) {
  for (Store& store : block.stores) {
    if (store.thread >= first_thread && store.thread < first_thread + threads) store.synced = true;
  }
}

Block& own_block() { return machine->blocks_[machine->current_->block]; }

// Of a block of the cluster.
int block_of(int rank) {
  const int cluster = machine->launch_.cluster;
  if (rank < 0 || rank >= cluster) fail("a rank outside of the cluster");
  return machine->current_->block / cluster * cluster + rank;
}

// The address of `local`, which is in this block's shared memory, in that of another block of the cluster.
void* remote(void* local, int rank) {
  const ptrdiff_t offset = static_cast<char*>(local) - own_block().shared.get();
  if (offset < 0 || static_cast<size_t>(offset) >= machine->launch_.shared_bytes)
    fail("not an address in shared memory");
  return machine->blocks_[block_of(rank)].shared.get() + offset;
}

}  // namespace

int thread_index() { return machine->current_->index; }
int block_index() { return machine->current_->block; }
int cluster_size() { return machine->launch_.cluster; }
int block_threads() { return machine->launch_.threads; }
bool present(const char* name) { return machine->present(name); }

void barrier(int id, int count, const char* name) {
  if (!present(name)) return;
  if (id < 0 || id >= kBarriers || count % kWarp != 0 || count > machine->launch_.threads) {
    fail(std::string("no such barrier: '") + name + "'");
  }
  // Only a barrier of the whole block is taken to order the stores of a thread before another thread's release.
  if (count == machine->launch_.threads) mark_synced(own_block(), machine->current_->index, 1);
  barrier_wait(own_block().barriers[id], count, name);
}

void cluster_barrier(const char* name) {
  if (!present(name)) return;
  const int cluster = machine->launch_.cluster;
  barrier_wait(machine->clusters_[machine->current_->block / cluster], cluster * machine->launch_.threads, name);
}

void warp_collective(WarpOperation operation, const void* in, void* out, const char* name) {
  if (!present(name)) return;
  Thread* self = machine->current_;
  Warp& warp = own_block().warps[self->index / kWarp];
  const int lane = self->index % kWarp;
  if (warp.arrived == 0) warp.operation = operation;
  if (warp.operation != operation) fail(std::string("the lanes of a warp are at different places, one at ") + name);
  warp.in[lane] = in;
  warp.out[lane] = out;
  warp.threads[lane] = self;
  if (++warp.arrived < kWarp) {
    machine->park(name);
    return;
  }
  warp.arrived = 0;
  if (operation != nullptr) operation(warp.in.data(), warp.out.data());
  for (Thread* thread : warp.threads) {
    if (thread != self) machine->wake(*thread);
  }
}

void wait_until(bool (*ready)(void*), void* argument, const char* name) {
  if (!present(name)) return;
  Thread& self = *machine->current_;
  self.ready = ready;
  self.ready_argument = argument;
  machine->polling_.push_back(&self);
  machine->park(name);
}

void copy_later(void* to, const void* from, size_t bytes) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes != 0) fail("a copy is not aligned");
  if ((machine->random_.next() & 3) == 0) {
    std::memcpy(to, from, bytes);
  } else {
    machine->current_->copies.push_back({to, from, bytes, machine->current_->group});
  }
}

void commit_copies() { ++machine->current_->group; }

void finish_copies(int but_groups) {
  Thread& thread = *machine->current_;
  const auto waits = [&](const Copy& copy) {
    return but_groups == 0 || static_cast<int32_t>(thread.group - copy.group) > but_groups;
  };
  for (const Copy& copy : thread.copies) {
    if (waits(copy)) std::memcpy(copy.to, copy.from, copy.bytes);
  }
  thread.copies.erase(std::remove_if(thread.copies.begin(), thread.copies.end(), waits), thread.copies.end());
}

void store_late(void* to, const void* value, size_t bytes) {
  Store store{to, {}, static_cast<int>(bytes), machine->current_->index, false};
  std::memcpy(store.value.data(), value, bytes);
  own_block().stores.push_back(store);
}

void release_stores() { machine->release(own_block(), machine->current_->index); }

void push_later(int rank, void* to, const void* value, size_t bytes, void* barrier, void (*completed)(void*, int)) {
  Push push{block_of(rank), remote(to, rank), {}, static_cast<int>(bytes), remote(barrier, rank), completed};
  std::memcpy(push.value.data(), value, bytes);
  machine->pushes_.push_back(push);
}

void fail(const std::string& what) {
  const Thread& self = *machine->current_;
  machine->error_ = "block " + std::to_string(self.block) + ", thread " + std::to_string(self.index) + ": " + what;
  machine->park("an error");
  std::abort();  // never resumed
}

Report run(const Launch& launch, void (*body)(const void*, char*), const void* argument) {
  Machine launched(launch, body, argument);
  machine = &launched;
  Report report = launched.run();
  machine = nullptr;
  return report;
}

}  // namespace fusedrnn::cuda::host
