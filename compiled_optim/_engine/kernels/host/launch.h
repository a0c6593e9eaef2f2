// A step: all that is written is written here.
#pragma once
#include "calls.h"
#include "step.h"

namespace {

// Whether the launches of a step take so long that it is worth to hold memory and let other threads run Python.
bool is_long(const Plan* plan) {
  double share = 0;  // of a long launch
  auto add = [&](const Launch& launch, const Table& table) {
    share += static_cast<double>(table.begins.back()) / static_cast<double>(launch.long_elements);
  };
  for (const auto& launch : plan->launches) add(launch, launch.table);
  for (const auto& turn : plan->turns) add(plan->launches[turn.launch], turn.table);
  return share >= 1;
}

void launch_all(Plan* plan, const PredictedScalars& scalars) {
  auto call = [&](const Launch& launch, const Table& table) {
    if (table.is_idle) return;
    launch.kernel(static_cast<int64_t>(table.rows.size()), table.cells.data(), table.begins.data(), table.rows.data(),
                  scalars.table.data(), scalars.addresses.data(), scalars.columns, launch.context);
  };
  for (const auto& launch : plan->launches) call(launch, launch.table);
  for (auto& turn : plan->turns) {
    if (!turn.copy.empty()) std::copy(turn.gradient.begin, turn.gradient.end, turn.copy.begin());
    call(plan->launches[turn.launch], turn.table);
  }
}

// Advances the counts that the host keeps, and expects those of the next step.
void count(Plan* plan, const PredictedScalars& scalars) {
  const auto& found = plan->found;
  auto& next = plan->next_counts;
  next.assign(found.values.size(), plan->counts ? 0 : 2);
  for (const auto& c : plan->counters) {
    c.write(c.slot ? scalars.table[scalars.ends[c.row] - found.width + c.slot] : found.of(c.row)[0]);
    next[c.row * found.width + c.slot] = c.read() + (c.slot == 0);  // as the tensor has rounded it
  }
  plan->expected.clear();
  for (size_t r = 0; r < found.rows(); r++) plan->expected.row(found.groups[r], next.data() + r * found.width);
}

// What a step is taken on. Nothing here may die before it is over.
struct Inputs {
  std::vector<Owned> lists;  // of parameters, by param group
  PyObject* state;
  SubstituteGrads substitutes;
  std::vector<void*> contexts;  // of the launches
  PredictedScalars scalars;

  void clear() {
    lists.clear();
    substitutes.clear();
    contexts.clear();
    scalars.clear();
  }
};

// What a step returns that needs other scalars, those of `Plan::found`.
constexpr char kUnexpected[] = "the step counts are not the expected ones";

// Takes a step. Returns nullptr; or, when nothing was written, why the plan no longer fits, or `kUnexpected`. No Python
// runs from the first look at a tensor to the last write, except in a long launch, for which memory is held. Holding it
// in every step would cost 15 us for 100 tensors.
const char* take_step(Plan* plan, const Inputs& inputs) {
  const auto& scalars = inputs.scalars;
  if (plan->busy) throw std::runtime_error("step() of this optimizer is already running in another thread");
  for (size_t l = 0; l < plan->launches.size(); l++) plan->launches[l].context = inputs.contexts[l];
  if (!same_params(plan, inputs.lists)) return "the param groups changed";
  if (const char* why = collect(plan, inputs.state, inputs.substitutes)) return why;
  if (const char* why = tabulate(plan)) return why;
  if (!(scalars.rows == plan->found)) return kUnexpected;
  const bool release_lock = is_long(plan);
  Held held;  // destroyed after `busy` is reset, because freeing memory may run Python
  struct Busy {
    bool& flag;
    ~Busy() { flag = false; }
  } busy{plan->busy};
  auto each_tensor = [&](auto action) {
    for (const size_t e : plan->listed) {
      if (plan->entries[e].idle) continue;
      const bool reads_gradient = !plan->launches[plan->entries[e].launch].scaled;
      for (size_t c = 0; c < plan->cells(); c++)
        if (const auto* t = plan->tensors[e * plan->cells() + c])
          action(const_cast<c10::TensorImpl*>(t), c == Memory::kGradient && reads_gradient);
    }
  };
  if (release_lock) each_tensor([&](auto* t, bool) { held.hold(t); });
  plan->busy = true;
  each_tensor([](auto* t, bool only_read) {
    if (!only_read) t->bump_version();
  });
  if (release_lock) {
    const Unlocked unlocked;
    launch_all(plan, scalars);
  } else {
    launch_all(plan, scalars);
  }
  count(plan, scalars);  // not before: a launch may throw
  for (const size_t e : plan->listed) plan->entries[e].fresh &= plan->entries[e].idle;
  return nullptr;
}

}  // namespace
