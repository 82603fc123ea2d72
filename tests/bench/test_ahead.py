"""What a kernel has in flight, counted in machine code as cuobjdump prints it."""

from __future__ import annotations

import pytest

from bench.gpu.ahead import bytes_ahead

LOOP = """
        /*0000*/                   LDGSTS.E.BYPASS.128 [R27], desc[UR14][R2.64], P5 ;      /* 0x00000000021b7fae */
        /*0010*/                   LDGDEPBAR ;                                             /* 0x00000000000079af */
        /*0020*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;                           /* 0x0000000000007b1d */
        /*0030*/                   DEPBAR.LE SB0, {wait} ;                                 /* 0x000082800000791a */
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;                           /* 0x0000000000007b1d */
        /*0050*/              @!P1 BRA 0x60 ;                                              /* 0x0000000000109947 */
        /*0060*/                   LDGSTS.E.BYPASS.128 [R13], desc[UR14][R2.64], P3 ;      /* 0x00000000020d7fae */
        /*0070*/                   LDGDEPBAR ;                                             /* 0x00000000000079af */
        /*0080*/              @!P6 LDGSTS.E [R103+0x4820], desc[UR14][R18.64], P5 ;        /* 0x048200001267efae */
        /*0090*/                   LDGSTS.E [R15+0x4000], desc[UR14][R8.64+-0x800], P3 ;   /* 0x04000800080f7fae */
        /*00a0*/                   LDGDEPBAR ;                                             /* 0x00000000000079af */
        /*00b0*/              @!P6 BRA 0x30 ;                                              /* 0xffffffe40038e947 */
        /*00c0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;                           /* 0x0000000000007b1d */
        /*00d0*/                   BRA {outer} ;                                           /* 0xffffffbc00387947 */
"""


@pytest.mark.parametrize("jump", ["BRA.U !UP0, 0x30", "@!P6 BRA !P5, 0x30", "BRA.U UP1, 0x30"])
def test_a_jump_may_have_a_predicate_before_its_place(jump):
    assert bytes_ahead(LOOP.replace("@!P6 BRA 0x30", jump).format(wait="0x2", outer="0x0"), 128) == 128 * 20


@pytest.mark.parametrize(("wait", "bytes_of_a_thread"), [("0x0", 0), ("0x1", 4), ("0x2", 20), ("0x4", 40), ("0x5", 44)])
def test_what_the_wait_lets_go_on_counts_and_copies_of_single_threads_do_not(wait, bytes_of_a_thread):
    assert bytes_ahead(LOOP.format(wait=wait, outer="0x0"), 128) == 128 * bytes_of_a_thread


def test_a_kernel_that_copies_nothing_ahead_has_nothing_in_flight():
    without = "\n".join(line for line in LOOP.splitlines() if "LDGSTS" not in line)
    assert bytes_ahead(without.format(wait="0x2", outer="0x0"), 128) == 0
    straight = "\n".join(line for line in LOOP.splitlines() if "BRA 0x30" not in line)
    assert bytes_ahead(straight.format(wait="0x2", outer="0xd0"), 128) == 0
