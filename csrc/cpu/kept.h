// What is kept from call to call, within a limit.
#pragma once

#include <cstdint>
#include <iterator>
#include <list>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

namespace fusedrnn {

// Items of some `bytes` each, which together take at most `limit`: those that were put in front the longest ago make
// room. Any number of threads may call; what derives from it locks the mutex around the items.
template <class Item>
class Shelf {
 public:
  explicit Shelf(int64_t limit) : limit_(limit) {}

  int64_t limit() const {
    const std::lock_guard lock(mutex_);
    return limit_;
  }
  void set_limit(int64_t limit) {
    const std::lock_guard lock(mutex_);
    limit_ = limit;
    make_room();
  }
  int64_t bytes() const {
    const std::lock_guard lock(mutex_);
    return bytes_;
  }

  // Keeps all threads out, for who is about to fork: a child has none of them, and would wait for ever for one that was
  // inside.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 protected:
  using Items = std::list<Item>;

  void put(Item item) {
    bytes_ += item.bytes;
    items_.push_front(std::move(item));
    make_room();
  }

  Item take_out(typename Items::iterator at) {
    Item item = std::move(*at);
    bytes_ -= item.bytes;
    items_.erase(at);
    return item;
  }

  mutable std::mutex mutex_;
  Items items_;

 private:
  void make_room() {
    while (bytes_ > limit_) take_out(std::prev(items_.end()));
  }

  int64_t limit_, bytes_ = 0;
};

// Where a value was made, what it was made of, and the value.
template <class Value>
struct KeptValue {
  std::vector<intptr_t> place;
  std::vector<uint64_t> fingerprint;
  Value value;
  int64_t bytes;
};

// Values for as long as what they were made of stays the same. A place has at most one, and it is given out only to who
// shows the fingerprint it was kept under.
template <class Value>
class Kept : public Shelf<KeptValue<Value>> {
 public:
  using Item = KeptValue<Value>;
  using Shelf<Item>::Shelf;

  std::optional<Value> find(const std::vector<intptr_t>& place, const std::vector<uint64_t>& fingerprint) {
    const std::lock_guard lock(this->mutex_);
    const auto found = at(place);
    if (found == this->items_.end() || found->fingerprint != fingerprint) return std::nullopt;
    this->items_.splice(this->items_.begin(), this->items_, found);
    return found->value;
  }

  void keep(Item item) {
    const std::lock_guard lock(this->mutex_);
    if (const auto found = at(item.place); found != this->items_.end()) this->take_out(found);
    this->put(std::move(item));
  }

 private:
  auto at(const std::vector<intptr_t>& place) {
    auto item = this->items_.begin();
    while (item != this->items_.end() && item->place != place) ++item;
    return item;
  }
};

}  // namespace fusedrnn
