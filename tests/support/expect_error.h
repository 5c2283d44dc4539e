// Expecting an Error with an exact message.
#pragma once

#include <gtest/gtest.h>

#include "ssm/core/error.h"

namespace ssm::test {

// f() must throw Error{code} whose text is `message`.
template <class F>
void expect_error(const char* message, F&& f, ErrorCode code = ErrorCode::invalid_argument) {
    try {
        f();
        ADD_FAILURE() << "no error: " << message;
    } catch (const Error& e) {
        EXPECT_STREQ(e.what(), message);
        EXPECT_EQ(e.code(), code);
    }
}

}  // namespace ssm::test
