/* Lossless crops of a baseline JPEG: entropy-coded blocks are walked over many bits at a time, and those of a rectangle copied
   into a small JPEG of their own. Nothing is dequantised or transformed; what the small file holds, libjpeg decodes.

   These are strangers' bytes. A scan is read through a window of unstuffed bytes; before each MCU the window holds all that an
   MCU can take (MCU_BYTES), or zeros behind the segment's end, which count as running out. Whatever libjpeg would warn of, or
   treat in a way of its own, ends the walk: codes that do not exist, coefficients behind the 63rd, segments that are too short,
   DC values out of range. */

#include "_jpeg_crop.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define STEP_BITS 12 /* of a look-up that passes several AC symbols */
#define CODE_BITS 9  /* of a look-up of one code */
#define END 512      /* coefficients that an end of block advances by */
#define STUCK 1023   /* and a look-up that does not hold one whole symbol */

/* A look-up says how many bits are passed, and by how much the coefficient advances. */
#define STEP(bits, coefficients) ((unsigned int)(bits) | (unsigned int)(coefficients) << 6)

#define MAX_BLOCKS 6                             /* of an MCU: 4:2:0 */
#define BLOCK_BITS (16 + 11 + 63 * (16 + 15))    /* at most */
#define MCU_BYTES (MAX_BLOCKS * BLOCK_BITS / 8 + 32)
#define WINDOW_BYTES 16384
#define KEPT_BYTES 8                             /* before the next one to be loaded: the bits in hand */
#define MAX_DC 2047                              /* a quantised DC coefficient of 8-bit samples */
#define DC_CODES 13                              /* differences of up to twice as much */
#define HEADER_BYTES 2048                        /* at most, of a file that is written */
#define MAX_JUMPED (INT32_MAX / 32767 / 4)       /* MCUs in which no sum of DC differences can overflow */

typedef struct {
    uint16_t first[1 << CODE_BITS]; /* by the next bits: length of the code, symbol << 8; 0: longer or none */
    uint32_t past[17];              /* one past the last code of a length; 0: none */
    int32_t offset[17];             /* from a code to its place among the symbols */
    uint8_t symbols[256];
} Codes;

/* By the next n bits, from 1 << n on: how far the whole symbols among them lead, as STEP. */
typedef uint16_t Steps[2 << STEP_BITS];

typedef struct {
    uint64_t bits;           /* the next one highest */
    unsigned int left;       /* how many of them are loaded for good; the others will be once more */
    const unsigned char *at; /* the next byte to be loaded */
} Bits;

typedef struct {
    int dc;
    size_t from, to; /* its AC codes: bits of the window */
} Block;

typedef struct {
    Codes dc[2], ac[2]; /* of the first component, and of the others */
    Steps steps[2];
    int component[MAX_BLOCKS], blocks;
    unsigned int rows, columns, unit_width, unit_height; /* in MCUs, and pixels of one */
    Bits in;
    const unsigned char *stop;       /* end of what is in the window */
    const unsigned char *next, *end; /* what is not yet in it */
    int last;                        /* the segment ends where the window does */
    int64_t value[3];                /* of the DC coefficients, so far */
    unsigned int mcu, interval, to_go;
    unsigned char window[WINDOW_BYTES + 2 * MCU_BYTES];
} Walk;

typedef struct {
    uint64_t bits; /* `count` of them, fewer than 32, lowest */
    unsigned int count;
    unsigned char *at, *end;
    int value[3];
    unsigned int left, top, right, bottom; /* in MCUs */
} Writer;

static inline __attribute__((always_inline)) uint64_t load(const unsigned char *at) {
    uint64_t value;
    memcpy(&value, at, sizeof value);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    value = __builtin_bswap64(value);
#endif
    return value;
}

/* 56 bits or more. */
static inline __attribute__((always_inline)) void refill(Bits *in) {
    in->bits |= load(in->at) >> in->left;
    in->at += (63 - in->left) >> 3;
    in->left |= 56;
}

static inline __attribute__((always_inline)) void drop(Bits *in, unsigned int count) {
    in->bits <<= count;
    in->left -= count;
}

/* The next code, of at most 16 bits: its symbol; -1 where there is none. */
static inline __attribute__((always_inline)) int symbol(Bits *in, const Codes *codes) {
    unsigned int found = codes->first[in->bits >> (64 - CODE_BITS)];
    if (found) {
        drop(in, found & 255);
        return (int)(found >> 8);
    }
    for (unsigned int length = CODE_BITS + 1; length <= 16; length++) {
        uint32_t code = (uint32_t)(in->bits >> (64 - length));
        if (code < codes->past[length]) {
            drop(in, length);
            return codes->symbols[(uint8_t)((int32_t)code + codes->offset[length])];
        }
    }
    return -1;
}

/* The difference of a DC coefficient to the one before; 0 where it has more bits than it may have. */
static inline __attribute__((always_inline)) int difference(Bits *in, const Codes *codes, int *value) {
    int size = symbol(in, codes);
    if (size <= 0 || size > 11) {
        *value = 0;
        return size == 0;
    }
    int found = (int)(in->bits >> (64 - size));
    *value = found >> (size - 1) ? found : found - (1 << size) + 1;
    drop(in, (unsigned int)size);
    return 1;
}

/* Past the AC symbols of a block; 0 where they are not as they should be. */
static inline __attribute__((always_inline)) int pass(Bits *in, const Codes *codes, const Steps steps) {
    unsigned int sum = STEP(0, 1); /* the next coefficient, and the bits passed since the last refill */
    for (;;) {
        uint64_t bits = in->bits, before = bits;
        unsigned int step = 0;
        refill(in);
        bits = in->bits;
        for (int i = 0; i < 56 / STEP_BITS; i++) {
            before = bits;
            step = steps[1 << STEP_BITS | bits >> (64 - STEP_BITS)];
            bits <<= step & 63;
            sum += step;
            if (sum >= STEP(0, 64)) break;
        }
        in->bits = bits;
        in->left -= sum & 63;
        sum &= ~63u;
        if (sum < STEP(0, 64)) continue;
        if (sum == STEP(0, 64) || (sum > STEP(0, END) && sum < STEP(0, END + 64))) return 1;
        /* Too far: what follows the 63rd coefficient is no AC code. One by one, then. */
        in->bits = before;
        in->left += step & 63;
        sum -= step & ~63u;
        refill(in);
        int found = symbol(in, codes);
        if (found < 0) return 0;
        if ((found & 15) == 0 && found != 0xF0) return 1;
        drop(in, (unsigned int)found & 15);
        sum += STEP(0, (unsigned int)(found >> 4) + 1);
        if (sum == STEP(0, 64)) return 1;
        if (sum > STEP(0, 64)) return 0;
    }
}

static ptrdiff_t taken(const Walk *walk) { return (walk->in.at - walk->window) * 8 - (ptrdiff_t)walk->in.left; }

/* More of the segment into the window. */
static int fetch(Walk *walk) {
    for (int i = 0; i < 3; i++)
        if (walk->value[i] > INT32_MAX / 4 || walk->value[i] < INT32_MIN / 4) return 0;
    if (walk->last) return taken(walk) <= (walk->stop - walk->window) * 8;
    const unsigned char *kept = walk->in.at - KEPT_BYTES;
    unsigned char *to = walk->window, *full = walk->window + WINDOW_BYTES;
    memmove(to, kept, (size_t)(walk->stop - kept));
    to += walk->stop - kept;
    walk->in.at = walk->window + KEPT_BYTES;
    while (to < full) {
        size_t room = (size_t)(full - to), rest = (size_t)(walk->end - walk->next), run = room < rest ? room : rest;
        const unsigned char *found = memchr(walk->next, 0xFF, run);
        if (found) run = (size_t)(found - walk->next);
        memcpy(to, walk->next, run);
        to += run;
        walk->next += run;
        if (!found) {
            if (walk->next == walk->end) return 0;
            continue;
        }
        if (walk->end - found < 2 || found[1] == 0xFF) return 0;
        if (found[1]) {
            walk->last = 1;
            memset(to, 0, 2 * MCU_BYTES);
            break;
        }
        *to++ = 0xFF;
        walk->next += 2;
    }
    walk->stop = to;
    return 1;
}

static inline __attribute__((always_inline)) int ready(Walk *walk) {
    return walk->stop - walk->in.at >= MCU_BYTES || fetch(walk);
}

/* Past `count` MCUs of a segment. */
static int pass_mcus(Walk *walk, unsigned int count) {
    while (count--) {
        if (!ready(walk)) return 0;
        Bits in = walk->in;
        for (int i = 0; i < walk->blocks; i++) {
            int component = walk->component[i], value;
            refill(&in);
            if (!difference(&in, &walk->dc[component > 0], &value)) return 0;
            walk->value[component] += value;
            if (!pass(&in, &walk->ac[component > 0], walk->steps[component > 0])) return 0;
        }
        walk->in = in;
    }
    return 1;
}

/* Look-ups of codes; 0 where libjpeg would refuse them, symbols above `most` among the reasons. */
static int make_codes(Codes *codes, const JHUFF_TBL *source, unsigned int most) {
    uint32_t code = 0;
    unsigned int at = 0;
    memset(codes->first, 0, sizeof codes->first);
    memcpy(codes->symbols, source->huffval, sizeof codes->symbols);
    for (unsigned int length = 1; length <= 16; length++) {
        unsigned int count = source->bits[length];
        if (at + count > 256 || (count && code + count >= 1u << length)) return 0;
        codes->past[length] = count ? code + count : 0;
        codes->offset[length] = (int32_t)at - (int32_t)code;
        for (unsigned int i = 0; i < count; i++) {
            if (codes->symbols[at + i] > most) return 0;
            if (length > CODE_BITS) continue;
            unsigned int spare = CODE_BITS - length, first = (code + i) << spare;
            for (unsigned int j = 0; j < 1u << spare; j++)
                codes->first[first + j] = (uint16_t)(length | (unsigned int)codes->symbols[at + i] << 8);
        }
        code = (code + count) << 1;
        at += count;
    }
    return 1;
}

/* Look-ups of AC symbols in a row: for n bits, the first symbol and then the look-up of the bits behind it. */
static void make_steps(Steps all, const JHUFF_TBL *source) {
    memset(all, 0, sizeof(Steps));
    for (unsigned int bits = 1; bits <= STEP_BITS; bits++) {
        uint16_t *steps = all + (1u << bits);
        uint32_t code = 0;
        unsigned int at = 0;
        for (unsigned int length = 1; length <= bits && length <= 16; length++, code <<= 1) {
            for (unsigned int end = at + source->bits[length]; at < end; at++, code++) {
                unsigned int found = source->huffval[at], extra = found & 15, whole = length + extra;
                if (whole > bits) continue;
                int ends = extra == 0 && found != 0xF0;
                uint16_t step = (uint16_t)STEP(whole, ends ? END : (found >> 4) + 1);
                const uint16_t *rest = all + (1u << (bits - whole));
                uint16_t *to = steps + (code << (bits - length));
                for (unsigned int i = 0; i < 1u << extra; i++)
                    for (unsigned int j = 0; j < 1u << (bits - whole); j++) *to++ = (uint16_t)(step + (ends ? 0 : rest[j]));
            }
        }
    }
    for (unsigned int i = 1u << STEP_BITS; i < 2u << STEP_BITS; i++)
        if (all[i] == 0) all[i] = STEP(0, STUCK);
}

/* To the marker that ends the segment, and past it; the walk then stands before the first bit of the next. */
static int next_segment(Walk *walk) {
    const unsigned char *at = walk->next;
    for (;; at++) {
        at = memchr(at, 0xFF, (size_t)(walk->end - at));
        if (at == NULL || walk->end - at < 2) return 0;
        if (at[1] == 0) at++;
        else if (at[1] != 0xFF) break;
    }
    if (at[1] < 0xD0 || at[1] > 0xD7) return 0;
    walk->next = at + 2;
    walk->last = 0;
    walk->stop = walk->in.at = walk->window + KEPT_BYTES;
    walk->in.bits = walk->in.left = 0;
    memset(walk->value, 0, sizeof walk->value);
    walk->to_go = walk->interval;
    return 1;
}

/* To an MCU; segments that end before it are passed unread, as libjpeg decodes each by itself. */
static int seek(Walk *walk, unsigned int mcu) {
    while (walk->mcu < mcu || walk->to_go == 0) {
        if (walk->to_go == 0 && !next_segment(walk)) return 0;
        unsigned int count = mcu - walk->mcu;
        if (count >= walk->to_go) {
            count = walk->to_go;
            if (walk->interval > MAX_JUMPED && !pass_mcus(walk, count)) return 0;
        } else if (!pass_mcus(walk, count)) {
            return 0;
        }
        walk->mcu += count;
        walk->to_go -= count;
    }
    return 1;
}

/* The next MCU, block by block. */
static int take(Walk *walk, Block *blocks) {
    if (!ready(walk)) return 0;
    for (int i = 0; i < walk->blocks; i++) {
        int component = walk->component[i], value;
        refill(&walk->in);
        if (!difference(&walk->in, &walk->dc[component > 0], &value)) return 0;
        walk->value[component] += value;
        if (walk->value[component] > MAX_DC || walk->value[component] < -MAX_DC) return 0;
        blocks[i].dc = (int)walk->value[component];
        blocks[i].from = (size_t)taken(walk);
        if (!pass(&walk->in, &walk->ac[component > 0], walk->steps[component > 0])) return 0;
        blocks[i].to = (size_t)taken(walk);
    }
    if (walk->last && taken(walk) > (walk->stop - walk->window) * 8) return 0;
    walk->mcu++;
    walk->to_go--;
    return 1;
}

/* Up to 32 bits. */
static inline __attribute__((always_inline)) void put(Writer *out, uint32_t value, unsigned int count) {
    out->bits = out->bits << count | value;
    out->count += count;
    if (out->count < 32) return;
    out->count -= 32;
    uint32_t word = (uint32_t)(out->bits >> out->count);
    int stuffed = ((~word - 0x01010101) & word & 0x80808080) != 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        *out->at++ = (unsigned char)(word >> shift);
        if (stuffed && out->at[-1] == 0xFF) *out->at++ = 0;
    }
}

static void put_blocks(Writer *out, const Walk *walk, const Block *blocks) {
    for (int i = 0; i < walk->blocks; i++) {
        int *before = &out->value[walk->component[i]], change = blocks[i].dc - *before, size = 0;
        *before = blocks[i].dc;
        for (int rest = change < 0 ? -change : change; rest; rest >>= 1) size++;
        uint32_t extra = (uint32_t)(change < 0 ? change + (1 << size) - 1 : change);
        put(out, (uint32_t)size << size | extra, 4 + (unsigned int)size);
        for (size_t at = blocks[i].from; at < blocks[i].to;) {
            unsigned int count = blocks[i].to - at < 32 ? (unsigned int)(blocks[i].to - at) : 32;
            put(out, (uint32_t)(load(walk->window + at / 8) << (at & 7) >> (64 - count)), count);
            at += count;
        }
    }
}

/* Room for one more MCU and for the end. */
static int grow(Writer *out, Piece *piece) {
    if (out->end - out->at >= 2 * MCU_BYTES + 16) return 1;
    size_t used = (size_t)(out->at - piece->file), size = 2 * (size_t)(out->end - piece->file);
    unsigned char *moved = realloc(piece->file, size);
    if (moved == NULL) return 0;
    piece->file = moved;
    out->at = moved + used;
    out->end = moved + size;
    return 1;
}

static const unsigned char ZIGZAG[DCTSIZE2] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6,  7,  14, 21, 28,
    35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63};

static unsigned char *put_two(unsigned char *to, unsigned int value) {
    *to++ = (unsigned char)(value >> 8);
    *to++ = (unsigned char)value;
    return to;
}

static unsigned char *put_segment(unsigned char *to, unsigned char marker, unsigned int payload) {
    *to++ = 0xFF;
    *to++ = marker;
    return put_two(to, payload + 2);
}

/* At most HEADER_BYTES: 3 * 133 for quantisation, 38 + 3 * 277 for codes, 61 for the rest. */
static unsigned char *put_header(unsigned char *to, const struct jpeg_decompress_struct *info, const Piece *piece) {
    static const unsigned char START[] = {0xFF, 0xD8}, JFIF[] = {'J', 'F', 'I', 'F', 0, 1, 1, 0, 0, 1, 0, 1, 0, 0};
    unsigned int count = (unsigned int)info->num_components;
    memcpy(to, START, sizeof START);
    to = put_segment(to + sizeof START, 0xE0, sizeof JFIF); /* YCbCr, if of three components */
    memcpy(to, JFIF, sizeof JFIF);
    to += sizeof JFIF;
    for (unsigned int i = 0; i < count; i++) {
        to = put_segment(to, 0xDB, 1 + 2 * DCTSIZE2);
        *to++ = (unsigned char)(0x10 | i);
        for (int k = 0; k < DCTSIZE2; k++)
            to = put_two(to, info->quant_tbl_ptrs[info->comp_info[i].quant_tbl_no]->quantval[ZIGZAG[k]]);
    }
    to = put_segment(to, 0xC1, 6 + 3 * count);
    *to++ = 8;
    to = put_two(put_two(to, piece->height), piece->width);
    *to++ = (unsigned char)count;
    for (unsigned int i = 0; i < count; i++) {
        *to++ = (unsigned char)(i + 1);
        *to++ = (unsigned char)(info->comp_info[i].h_samp_factor << 4 | info->comp_info[i].v_samp_factor);
        *to++ = (unsigned char)i;
    }
    to = put_segment(to, 0xC4, 17 + DC_CODES);
    memset(to, 0, 17);
    to[4] = DC_CODES; /* all of four bits */
    to += 17;
    for (unsigned int i = 0; i < DC_CODES; i++) *to++ = (unsigned char)i;
    for (unsigned int i = 0; i < count; i++) {
        const JHUFF_TBL *table = info->ac_huff_tbl_ptrs[info->comp_info[i].ac_tbl_no];
        unsigned int symbols = 0;
        for (int length = 1; length <= 16; length++) symbols += table->bits[length];
        to = put_segment(to, 0xC4, 17 + symbols);
        *to++ = (unsigned char)(0x10 | i);
        memcpy(to, table->bits + 1, 16);
        memcpy(to + 16, table->huffval, symbols);
        to += 16 + symbols;
    }
    to = put_segment(to, 0xDA, 4 + 2 * count);
    *to++ = (unsigned char)count;
    for (unsigned int i = 0; i < count; i++) {
        *to++ = (unsigned char)(i + 1);
        *to++ = (unsigned char)i;
    }
    *to++ = 0;
    *to++ = DCTSIZE2 - 1;
    *to++ = 0;
    return to;
}

/* Where the piece lies, and the beginning of its file. */
static int open_piece(const struct jpeg_decompress_struct *info, const Walk *walk, Piece *piece, Writer *out) {
    /* Where chroma is upsampled, pixels depend on the two beyond them. */
    unsigned int beside = walk->unit_width > DCTSIZE ? 2 : 0, above = walk->unit_height > DCTSIZE ? 2 : 0;
    memset(out, 0, sizeof *out);
    out->left = (piece->left > beside ? piece->left - beside : 0) / walk->unit_width;
    out->top = (piece->top > above ? piece->top - above : 0) / walk->unit_height;
    out->right = (piece->right + beside + walk->unit_width - 1) / walk->unit_width;
    out->bottom = (piece->bottom + above + walk->unit_height - 1) / walk->unit_height;
    if (out->right > walk->columns) out->right = walk->columns;
    if (out->bottom > walk->rows) out->bottom = walk->rows;
    /* Of one or two columns of chroma libjpeg upsamples in another way. */
    if (beside && out->left && out->right == walk->columns && info->image_width - out->left * walk->unit_width <= 4) out->left--;
    piece->at_left = out->left * walk->unit_width;
    piece->at_top = out->top * walk->unit_height;
    piece->width = (out->right < walk->columns ? out->right * walk->unit_width : info->image_width) - piece->at_left;
    piece->height = (out->bottom < walk->rows ? out->bottom * walk->unit_height : info->image_height) - piece->at_top;
    size_t room = HEADER_BYTES + 32768 + 2 * MCU_BYTES;
    piece->file = malloc(room);
    if (piece->file == NULL) return 0;
    out->at = put_header(piece->file, info, piece);
    piece->scan = (size_t)(out->at - piece->file);
    out->end = piece->file + room;
    return 1;
}

static void close_piece(Piece *piece, Writer *out) {
    put(out, 0x7F, 7);
    for (; out->count >= 8; out->count -= 8)
        if ((*out->at++ = (unsigned char)(out->bits >> (out->count - 8))) == 0xFF) *out->at++ = 0;
    *out->at++ = 0xFF;
    *out->at++ = 0xD9;
    piece->size = (size_t)(out->at - piece->file);
}

/* The one scan of a file that is what it seems to be, with the tables that it needs. */
static int begin(Walk *walk, const struct jpeg_decompress_struct *info) {
    if (info->progressive_mode || info->arith_code || info->data_precision != 8) return 0;
    if (info->comps_in_scan != info->num_components || (info->num_components != 1 && info->num_components != 3)) return 0;
    if (info->Ss != 0 || info->Se != DCTSIZE2 - 1 || info->Ah != 0 || info->Al != 0) return 0;
    for (int i = 0; i < info->num_components; i++) {
        const jpeg_component_info *c = &info->comp_info[i];
        if (info->cur_comp_info[i] != c || c->dc_tbl_no >= NUM_HUFF_TBLS || c->ac_tbl_no >= NUM_HUFF_TBLS) return 0;
        if (c->quant_tbl_no >= NUM_QUANT_TBLS || info->quant_tbl_ptrs[c->quant_tbl_no] == NULL) return 0;
        if (i == 2 && (c->dc_tbl_no != c[-1].dc_tbl_no || c->ac_tbl_no != c[-1].ac_tbl_no)) return 0;
        if (i < 2) {
            const JHUFF_TBL *dc = info->dc_huff_tbl_ptrs[c->dc_tbl_no], *ac = info->ac_huff_tbl_ptrs[c->ac_tbl_no];
            if (dc == NULL || ac == NULL || !make_codes(&walk->dc[i], dc, 15) || !make_codes(&walk->ac[i], ac, 255)) return 0;
            make_steps(walk->steps[i], ac);
        }
        if (walk->blocks + c->h_samp_factor * c->v_samp_factor > MAX_BLOCKS) return 0;
        for (int j = 0; j < c->h_samp_factor * c->v_samp_factor; j++) walk->component[walk->blocks++] = i;
    }
    if (info->num_components == 1 && walk->blocks != 1) return 0;
    walk->unit_width = (unsigned int)info->max_h_samp_factor * DCTSIZE;
    walk->unit_height = (unsigned int)info->max_v_samp_factor * DCTSIZE;
    walk->columns = (info->image_width + walk->unit_width - 1) / walk->unit_width;
    walk->rows = (info->image_height + walk->unit_height - 1) / walk->unit_height;
    walk->interval = info->restart_interval;
    walk->to_go = walk->interval ? walk->interval : walk->columns * walk->rows;
    walk->stop = walk->in.at = walk->window + KEPT_BYTES;
    return 1;
}

static int crop(Walk *walk, Piece *pieces, Writer *out, int count) {
    Block blocks[MAX_BLOCKS];
    for (unsigned int row = 0; row < walk->rows; row++) {
        unsigned int left = walk->columns, right = 0;
        for (int i = 0; i < count; i++) {
            if (row < out[i].top || row >= out[i].bottom) continue;
            if (out[i].left < left) left = out[i].left;
            if (out[i].right > right) right = out[i].right;
        }
        for (unsigned int column = left; column < right; column++) {
            int wanted = 0;
            for (int i = 0; i < count; i++) {
                if (row < out[i].top || row >= out[i].bottom || column < out[i].left || column >= out[i].right) continue;
                if (!wanted++ && (!seek(walk, row * walk->columns + column) || !take(walk, blocks))) return 0;
                if (!grow(&out[i], &pieces[i])) return 0;
                put_blocks(&out[i], walk, blocks);
            }
        }
    }
    for (int i = 0; i < count; i++) close_piece(&pieces[i], &out[i]);
    return 1;
}

int crop_jpeg(const struct jpeg_decompress_struct *info, const unsigned char *scan, const unsigned char *end, Piece *pieces,
              int count) {
    Writer out[MAX_PIECES];
    Walk *walk = calloc(1, sizeof *walk);
    int done = walk != NULL && count <= MAX_PIECES && begin(walk, info);
    if (done) {
        walk->next = scan;
        walk->end = end;
        for (int i = 0; i < count; i++) done = done && open_piece(info, walk, &pieces[i], &out[i]);
        done = done && crop(walk, pieces, out, count);
    }
    free(walk);
    return done;
}
