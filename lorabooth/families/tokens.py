"""Finds the rare identifier that names a subject, as DreamBooth does (arXiv 2208.12242, section 3.2).

The paper looks up rare tokens in the tokenizer's own vocabulary and turns them back into text, so that the
identifier is short, is really there, and carries little meaning of its own: no English word (its meaning
would have to be unlearned first) and no random letters (they fall apart into common ones).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lorabooth.errors import BaseModelError

WORD_END = "</w>"
CONSONANTS = "qxzjvkwbfgpmchdlnrst"
"""Rarest in English first; "y" is left out, it makes words."""

POOL = 16
"""A seed picks among this many of the rarest identifiers."""

# Letter groups without vowels that stand for something: leagues, channels, companies, places, units, file
# types, computing, medicine, weapons, chat. A photo caption may have taught the base what they look like.
KNOWN_MEANINGS = frozenset(
    """
    bbc bbl bbm bbq bbw bc bcc bdg bf bfc bff bg bhp bjj bjp bk blm bln blr blt bm bmc bmt bmw bmx bn bnp
    bp bpd bpm bps brb brs brt bsc bsd bsf bt btc btr bts btv btw bw cb cbc cbd cbp cbs cc ccd ccp cd cdc
    cf cfc cfd cfp cg cgs chc chd chk ck cl clg cls cm cmc cmd cmt cn cnc cng cnn cns cp cpc cpl cpr cps
    cpt cq cr crc crm crt cs csc csk csm csn css cst ct ctc ctr ctv cv cvs cws cx db dbs dbz dc dcc dcs dd
    ddc ddr dds df dfb dfs dhl dhs dj dk dl dlc dm dmc dmv dmx dn dnb dnc dnd dnr dns dp dps dr ds dsc dsp
    dst dt dtm dts dv dvd dvr dwp dx fb fbs fc fcb fck fd fdr ff ffs fhs fk fl flv fm fml fn fnc fpl fps
    fpv fr frs ft ftc ftp ftw fw fwd fx gb gbp gbr gc gcc gdp gf gfs gg gh gk gl glc gm gmb gmc gms gmt gn
    gp gps gq gr grc grl grp gs gsc gsm gsp gst gt gtg gtr gts gtx hb hbd hbr hc hcs hd hdd hdr hf hg hgv
    hh hhs hk hl hm hms hmv hp hpc hpv hq hr hrh hrs hrw hs hsc hst hsv ht hv hw hws hxh jb jc jcb jd jdm
    jf jfc jfk jg jhb jj jk jkt jl jm jp jpg jpn jr js jst jt jv jw kb kbs kc kcr kd kfc kg kgb kgs kh khz
    kj kjv kk kkk kkr kl klm km kmh kn kp kph kpk kr ks ksh kt ktm kts kv kw kwh kzn lb lbc lbj lbs lc lcd
    lcs ld ldr lds lf lfc lfw lg lgm lh ll llb llc llp lm lmp ln lp lpc lpg lr lrt ls lsd lt ltc ltd lv
    lvl lw mb mc mcd mcg mcm mcs md mdc mds mdt mf mfc mfg mg mgm mgr mgs mgt mh mhz mk ml mlb mlc mlg mlk
    mlm mls mm mmc mmj mms mn mnd mnf mp mpg mph mps mr mrs mrt ms msc msd msf msg msl msm msn mss mst mt
    mtb mtc mth mtr mtv mtx mv mvc mvp mvt mw mwc mwf mx nb nbc nbl nc ncc ncs nd ndc nf nfc nfl ng ngc
    ngl nh nhc nhl nhq nhs nj nl nlp nm nmd nn nnn np npc npr npt nq nr nrc nrf nrg nrl ns nsf nsw nt ntr
    nts ntv nv nvm nw nws nwt nx nxt nz nzd pb pbc pbr pbs pc pcc pcm pcr pcs pd pdf pdt pf pfc pg pgh pgs
    ph phc phd phl phx pk pkg pkk pl pln pls plz pm pmc pms pn png pnp pnw pp ppc ppg ppl ppm ppp pps ppv
    pq pr prc ps psc psd psg psl psn psp pss pst psv pt ptc ptv pv pvc pvp pvt pw pwr pww px qb qbs qc qld
    qr qs qt qtr rb rbc rbs rc rcb rcn rd rdr rf rg rgb rgv rh rj rk rl rm rmb rms rn rnb rnc rnr rp rpg
    rpm rps rr rs rsc rsl rss rt rtc rtr rts rtx rv rw rwc rx sb sbc sbs sc scd scp scr sd sdf sdk sdn sf
    sfb sff sfx sg sgh sgt sh shh shp shs sht sj sk sks skt sl slc slp slr sls slt sm smb smc smg smh smp
    sms smx sn snc snf sng snl snp snz sp spd spf spg spl spp sq sql sqm sqn sr srh srk srl srp srs srt ss
    ssb ssc ssd ssg ssh ssl ssn ssp ssr sst st std stg sth stl stm sv svc svp svt sw swc swp sx szn tb tbc
    tbd tbh tbr tbs tbt tc tcm tcs td tdp tf tfc tfl tg tgt th thn thx tk tks tl tlc tls tm tmr tms tmw
    tmz tn tnt tp tpp tr trc trx ts tsb tsc tsk tsm tsn tsp tt ttc ttm ttp tv tvc tvd tvn tvs tw twc twd
    tx txt vb vc vcr vcs vd vdc vfl vfx vg vhs vj vk vl vm vn vp vpn vr vs vss vt vv vvs vw vx wb wbc wbz
    wc wcc wcw wd wdw wf wfc wfp wg wh whl wht wjc wk wm wmd wn wp wpg wps wr wrc wrs ws wsj wsl wsw wt
    wtc wtf wth wts ww wwc wwd wwf wwg www wwx wx xbl xc xd xj xk xl xm xml xp xr xrp xs xt xtc xx xxl xxx
    zf zl zm zr zs zt zz zzz
    """.split()  # noqa: SIM905 - seven hundred quoted words are not read more easily
)


@dataclass(frozen=True, slots=True)
class Identifier:
    """A text that a tokenizer takes for one to three rare tokens.

    Attributes:
        text: what stands in prompts, e.g. "qzx"; two or three ASCII consonants, lower case.
        token_ids: what the tokenizer makes of it, without special tokens.
        reason: why it was chosen, in a few words.
    """

    text: str
    token_ids: tuple[int, ...]
    reason: str


def find_identifier(tokenizer: Any, *, seed: int = 0, avoid: Collection[str] = ()) -> Identifier:
    """Look up a rare identifier in a tokenizer's vocabulary.

    First choice is a single whole-word token of two or three consonants from the rarer half of the
    vocabulary (in byte-pair encoding, ids follow frequency: the last merges are the rarest). Small
    vocabularies without one get three rare consonants that make two or three tokens.

    Args:
        tokenizer: of CLIP's kind: byte-pair encoding whose whole words end in "</w>".
        seed: 0 takes the rarest; other seeds pick another of the `POOL` rarest.
        avoid: texts that are taken, e.g. identifiers of other subjects and their nouns, in any case.

    Returns:
        The same identifier for the same arguments, on every machine.

    Raises:
        BaseModelError: the vocabulary offers nothing.
    """
    taken = {text.lower() for text in avoid}
    for candidates in (_single_tokens(tokenizer), _letter_groups(tokenizer)):
        good = (found for found in candidates if found.text not in taken and found.text not in KNOWN_MEANINGS)
        if pool := list(itertools.islice(good, POOL)):
            return pool[seed % len(pool)]
    raise BaseModelError(
        "the base's tokenizer has no rare token to name the subject with",
        'Write a token of your own in the recipe: token = "..." under [[subjects]].',
    )


def _single_tokens(tokenizer: Any) -> Iterator[Identifier]:
    """Whole-word tokens of two or three consonants, rarest first, down to the middle of the merges."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    merges = sorted((i, token) for token, i in vocabulary.items() if len(token.removesuffix(WORD_END)) > 1)
    special = set(tokenizer.all_special_ids)
    for token_id, token in reversed(merges[len(merges) // 2 :]):
        text = token.removesuffix(WORD_END)
        if text == token or token_id in special or len(text) > 3 or not set(text) <= set(CONSONANTS):
            continue
        if _ids(tokenizer, text) == (token_id,) and token_id in _ids(tokenizer, f"a {text} x")[1:2]:
            reason = f"rare token {token_id} of {len(vocabulary)} in the base's vocabulary, no word"
            yield Identifier(text, (token_id,), reason)


def _letter_groups(tokenizer: Any) -> Iterator[Identifier]:
    """Three consonants that a small vocabulary knows only as two or three tokens, rare letters first."""
    unknown = tokenizer.unk_token_id
    for letters in itertools.permutations(CONSONANTS, 3):
        text = "".join(letters)
        ids = _ids(tokenizer, text)
        if 2 <= len(ids) <= 3 and unknown not in ids and tokenizer.decode(list(ids)).strip() == text:
            yield Identifier(text, ids, f"{len(ids)} rare tokens; this small vocabulary has no single one")


def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    ids: Sequence[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tuple(ids)
