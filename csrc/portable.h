// Asks glibc for the exp, log and pow that it has had from the start: they give the bits of those that a compiler on a newer
// system would ask for, and wheels run on every glibc from 2.28 on (manylinux_2_28). See portable.cpp.
#pragma once
#include <cmath>

#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver exp, exp@GLIBC_2.2.5\n.symver log, log@GLIBC_2.2.5\n.symver pow, pow@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver exp, exp@GLIBC_2.17\n.symver log, log@GLIBC_2.17\n.symver pow, pow@GLIBC_2.17");
#endif
