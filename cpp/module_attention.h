// What of the module concerns attention, for those parts that attend too.

#pragma once

#include <string>

#include "attention.h"

namespace narrowkv {

// A problem, and whether it can be read in int16. What it points into is of whoever makes it, for as long as it is used.
struct OwnedProblem {
    Problem problem{};
    bool int16 = false;
};

// Raises std::invalid_argument where a kernel does not attend to what the problem does.
void require_kernel(const OwnedProblem& problem, const std::string& kernel);

// That of a name; raises std::invalid_argument where there is none.
AttendProblems& attention_kernel(const std::string& kernel);

}  // namespace narrowkv
