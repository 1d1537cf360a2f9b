// Which kernels run: the best that the processor has, unless a test or CFSFL_ISA in the environment says otherwise.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace cfsfl {

const Kernels& kernels();                      // those in use
std::vector<std::string> supported_isas();     // worst first
std::string set_isa(const std::string& name);  // "auto" or one of them; the previous name
bool coarse_available();                       // 8-bit dot products
bool screening();                              // whether integer screening is used where it is available
bool set_screening(bool on);                   // the previous choice

// Sets or clears flush-to-zero in every thread that calls it; returns the old choice.
bool flush_denormals_here(bool on);
bool denormals_flushed_here();

// The same in every thread of the pool, for `flush_denormals` and before every operation: threads that disagree would
// give a user scores that depend on who computed them. Returns the caller's old choice.
bool flush_denormals_everywhere(bool on, int threads);
void follow_caller(int threads);

// Flush-to-zero for the life of a scope, in one thread.
struct FlushScope {
    bool old = flush_denormals_here(true);
    ~FlushScope() { flush_denormals_here(old); }
};

}  // namespace cfsfl
