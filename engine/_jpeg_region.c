/* Regions of a JPEG by libjpeg-turbo: rows and columns nobody asks for are entropy-decoded at most, never transformed.

   decode() has libjpeg skip them. cut() has a small JPEG made of each rectangle first (_jpeg_crop.c), which is quicker, and is for
   baseline files alone. Both answer None wherever a full decode might say anything else than "fine": on every error, every warning, every kind
   of file beside 8-bit grey and YCbCr at the common samplings, and on one whose end is missing. The caller then asks the
   safe decoder (Pillow), which decides. See engine/jpeg_region.py.

   The library is not linked but opened by its path, without a share in anybody else's symbols: Pillow's own copy, as a rule. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <dlfcn.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "_jpeg_crop.h"

#define MAX_BANDS 8

/* What is called of the library; filled by use(). */
static struct {
    struct jpeg_error_mgr *(*std_error)(struct jpeg_error_mgr *);
    void (*create)(j_decompress_ptr, int, size_t);
    void (*destroy)(j_decompress_ptr);
    void (*mem_src)(j_decompress_ptr, const unsigned char *, unsigned long);
    int (*read_header)(j_decompress_ptr, boolean);
    boolean (*start)(j_decompress_ptr);
    boolean (*several_scans)(const struct jpeg_decompress_struct *);
    void (*crop)(j_decompress_ptr, JDIMENSION *, JDIMENSION *);
    JDIMENSION (*skip)(j_decompress_ptr, JDIMENSION);
    JDIMENSION (*read)(j_decompress_ptr, JSAMPARRAY, JDIMENSION);
} jpeg;

typedef struct {
    unsigned int top, bottom;
    unsigned char *pixels;
} Band;

typedef struct {
    const unsigned char *data;
    size_t size;
    size_t scan; /* where the first entropy-coded segment begins */
    unsigned int width, height, left, right;
    Band bands[MAX_BANDS];
    int count;
    unsigned char *row; /* one row of the columns that are decoded */
    Piece *pieces;
} Job;

typedef int Work(struct jpeg_decompress_struct *, Job *);

typedef struct {
    struct jpeg_error_mgr base;
    jmp_buf leave;
} Errors;

static void leave(j_common_ptr info) { longjmp(((Errors *)info->err)->leave, 1); }

/* Whether bytes of a progressive file were left before a marker: those of rows below the last that its shortened frame has. By the
   text, as the library is not the one of the headers, and its codes may differ. */
static int is_left_over(j_common_ptr info) {
    int code = info->err->msg_code;
    return ((j_decompress_ptr)info)->progressive_mode && code > 0 && code <= info->err->last_jpeg_message &&
           strstr(info->err->jpeg_message_table[code], "extraneous bytes before marker") != NULL;
}

static void on_message(j_common_ptr info, int level) {
    if (level < 0 && !is_left_over(info)) leave(info); /* a warning: damaged data */
}

static void on_output(j_common_ptr info) { (void)info; }

/* Grey, or YCbCr at 4:4:4, 4:2:2, 4:4:0 or 4:2:0, of the size the caller has checked against its limits. */
static int is_plain(const struct jpeg_decompress_struct *info, const Job *job) {
    const jpeg_component_info *c = info->comp_info;
    if (info->image_width != job->width || info->image_height != job->height || info->data_precision != 8) return 0;
    if (info->arith_code) return 0;
    if (info->num_components == 1) /* of whatever factor: there is nothing to upsample against */
        return info->jpeg_color_space == JCS_GRAYSCALE && c[0].h_samp_factor <= 2 && c[0].v_samp_factor <= 2;
    if (info->num_components != 3 || info->jpeg_color_space != JCS_YCbCr) return 0;
    for (int i = 1; i < 3; i++)
        if (c[i].h_samp_factor != 1 || c[i].v_samp_factor != 1) return 0;
    return c[0].h_samp_factor <= 2 && c[0].v_samp_factor <= 2;
}

/* Whether every coefficient has all its bits: otherwise libjpeg smooths over blocks, by neighbours that are not decoded here. */
static int is_complete(const struct jpeg_decompress_struct *info) {
    if (!info->progressive_mode) return 1;
    if (info->coef_bits == NULL) return 0;
    for (int i = 0; i < info->num_components; i++)
        for (int k = 0; k < DCTSIZE2; k++)
            if (info->coef_bits[i][k] != 0) return 0;
    return 1;
}

static unsigned long units(unsigned int length, int of) {
    unsigned int one = (unsigned int)of * DCTSIZE;
    return ((unsigned long)length + one - 1) / one;
}

/* Whether the only scan ends as it should: restart markers in sequence and in number, then the end of the image. A full decode
   then never runs out of data, whatever the entropy-coded bytes are. */
static int ends_well(const struct jpeg_decompress_struct *info, const Job *job) {
    int alone = info->num_components == 1; /* its MCUs are blocks, whatever its factors */
    unsigned long mcus = units(info->image_width, alone ? 1 : info->max_h_samp_factor) *
                         units(info->image_height, alone ? 1 : info->max_v_samp_factor);
    unsigned long restarts = info->restart_interval ? (mcus - 1) / info->restart_interval : 0, seen = 0;
    const unsigned char *at = job->data + job->scan, *end = job->data + job->size;
    while ((at = memchr(at, 0xFF, (size_t)(end - at))) != NULL) {
        if (++at == end) return 0;
        if (*at == 0xFF) continue;
        unsigned char code = *at++;
        if (code == 0) continue;
        if (code == 0xD9) return seen == restarts;
        if (code != 0xD0 + (seen & 7) || seen == restarts) return 0;
        seen++;
    }
    return 0;
}

/* Rows of the bands into their buffers; 0 where the safe decoder has to decide. `info` is started. */
static int read_bands(struct jpeg_decompress_struct *info, Job *job) {
    unsigned int margin = (unsigned int)info->max_h_samp_factor * DCTSIZE;
    JDIMENSION from = job->left / margin * margin;
    from = from > margin ? from - margin : 0; /* upsampling looks at the neighbouring column */
    JDIMENSION to = (job->right + 2 * margin - 1) / margin * margin;
    to = to < job->width ? to : job->width;
    JDIMENSION asked = from, columns = to - from;
    if (columns < job->width) {
        jpeg.crop(info, &from, &columns);
        if (from > asked || from + columns < to) return 0;
    }
    size_t lead = (size_t)(job->left - from) * 3, length = (size_t)(job->right - job->left) * 3;
    for (int i = 0; i < job->count; i++) {
        Band *band = &job->bands[i];
        unsigned int skip = band->top - info->output_scanline;
        if (skip && jpeg.skip(info, skip) != skip) return 0;
        for (unsigned char *to_row = band->pixels; info->output_scanline < band->bottom; to_row += length) {
            JSAMPROW rows = job->row;
            if (jpeg.read(info, &rows, 1) != 1) return 0;
            memcpy(to_row, job->row + lead, length);
        }
    }
    return 1;
}

/* Rows by libjpeg alone; the header is read. */
static int skip_and_read(struct jpeg_decompress_struct *info, Job *job) {
    info->out_color_space = JCS_RGB;
    info->dct_method = JDCT_ISLOW;
    if (!jpeg.start(info) || !is_complete(info)) return 0;
    /* Of a file of several scans every one was read by now, to the end of the image. */
    return (jpeg.several_scans(info) || ends_well(info, job)) && read_bands(info, job);
}

/* A small file for each piece; the header is read. */
static int write_pieces(struct jpeg_decompress_struct *info, Job *job) {
    return !jpeg.several_scans(info) && ends_well(info, job) &&
           crop_jpeg(info, job->data + job->scan, job->data + job->size, job->pieces, job->count);
}

/* Read the header and do the work; all of it without the GIL: nothing here calls Python. */
static int run(Job *job, Work *work) {
    struct jpeg_decompress_struct info;
    Errors errors;
    memset(&info, 0, sizeof info);
    info.err = jpeg.std_error(&errors.base);
    errors.base.error_exit = leave;
    errors.base.emit_message = on_message;
    errors.base.output_message = on_output;
    if (setjmp(errors.leave)) {
        jpeg.destroy(&info);
        return 0;
    }
    jpeg.create(&info, JPEG_LIB_VERSION, sizeof info);
    jpeg.mem_src(&info, job->data, (unsigned long)job->size);
    int done = jpeg.read_header(&info, TRUE) == JPEG_HEADER_OK && is_plain(&info, job);
    /* Both must mean the same first byte of the scan. */
    done = done && info.src->next_input_byte == job->data + job->scan && work(&info, job);
    jpeg.destroy(&info);
    return done;
}

/* By way of small files: each piece's pixels into the band of the same number. */
static int run_pieces(Job *job) {
    int done = run(job, write_pieces);
    for (int i = 0; i < job->count; i++) {
        const Piece *piece = &job->pieces[i];
        Job one;
        memset(&one, 0, sizeof one);
        one.data = piece->file;
        one.size = piece->size;
        one.scan = piece->scan;
        one.width = piece->width;
        one.height = piece->height;
        one.left = piece->left - piece->at_left;
        one.right = piece->right - piece->at_left;
        one.bands[0] = (Band){piece->top - piece->at_top, piece->bottom - piece->at_top, job->bands[i].pixels};
        one.count = 1;
        one.row = job->row; /* of the whole picture's width, and more */
        done = done && run(&one, skip_and_read);
        free(piece->file);
    }
    return done;
}

static int parse_bands(PyObject *bands, Job *job) {
    unsigned int last = 0;
    Py_ssize_t count = PyTuple_Size(bands);
    if (count < 0) return 0;
    if (count < 1 || count > MAX_BANDS) {
        PyErr_SetString(PyExc_ValueError, "one to eight bands");
        return 0;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        Band *band = &job->bands[i];
        if (!PyArg_ParseTuple(PyTuple_GetItem(bands, i), "II", &band->top, &band->bottom)) return 0;
        if (band->top < last || band->bottom <= band->top || band->bottom > job->height) {
            PyErr_SetString(PyExc_ValueError, "bands must ascend within the picture");
            return 0;
        }
        last = band->bottom;
    }
    job->count = (int)count;
    return 1;
}

static int parse_boxes(PyObject *boxes, Job *job) {
    Py_ssize_t count = PyTuple_Size(boxes);
    if (count < 0) return 0;
    if (count < 1 || count > MAX_PIECES) {
        PyErr_SetString(PyExc_ValueError, "one to eight boxes");
        return 0;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        Piece *piece = &job->pieces[i];
        if (!PyArg_ParseTuple(PyTuple_GetItem(boxes, i), "IIII", &piece->left, &piece->top, &piece->right, &piece->bottom)) return 0;
        if (piece->left >= piece->right || piece->top >= piece->bottom || piece->right > job->width || piece->bottom > job->height) {
            PyErr_SetString(PyExc_ValueError, "boxes must lie within the picture");
            return 0;
        }
        job->bands[i].top = piece->top;
        job->bands[i].bottom = piece->bottom;
    }
    job->count = (int)count;
    return 1;
}

/* Whether a file and what is said of it fit together. */
static int check(Job *job, const Py_buffer *data, Py_ssize_t scan) {
    job->data = data->buf;
    job->size = (size_t)data->len;
    job->scan = (size_t)scan;
    if (scan >= 0 && scan <= data->len && job->width && job->height && job->width <= JPEG_MAX_DIMENSION &&
        job->height <= JPEG_MAX_DIMENSION)
        return 1;
    PyErr_SetString(PyExc_ValueError, "no such scan or size");
    return 0;
}

/* Bytes for each band of the job, filled; None where the safe decoder has to decide. */
static PyObject *answer(Job *job, int pieces) {
    PyObject *made = PyTuple_New(job->count);
    if (made == NULL) return NULL;
    for (int i = 0; i < job->count; i++) {
        unsigned int columns = pieces ? job->pieces[i].right - job->pieces[i].left : job->right - job->left;
        PyObject *part = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(job->bands[i].bottom - job->bands[i].top) * columns * 3);
        if (part == NULL || PyTuple_SetItem(made, i, part) < 0) {
            Py_DECREF(made);
            return NULL;
        }
        job->bands[i].pixels = (unsigned char *)PyBytes_AsString(part);
    }
    job->row = malloc((size_t)job->width * 3 + 64);
    if (job->row == NULL) {
        Py_DECREF(made);
        return PyErr_NoMemory();
    }
    int done;
    Py_BEGIN_ALLOW_THREADS
    done = pieces ? run_pieces(job) : run(job, skip_and_read);
    Py_END_ALLOW_THREADS
    free(job->row);
    if (done) return made;
    Py_DECREF(made);
    return Py_NewRef(Py_None);
}

PyDoc_STRVAR(decode_doc,
             "decode(data, scan, width, height, left, right, bands) -> tuple of bytes, one a band, or None\n\n"
             "data: the file; scan: offset of its first entropy-coded byte; width, height: as in its header;\n"
             "left, right: columns; bands: tuple of (top, bottom), ascending and disjoint. Each answer holds RGB,\n"
             "(bottom - top) * (right - left) * 3 bytes. None: ask the safe decoder.");

PyDoc_STRVAR(cut_doc,
             "cut(data, scan, width, height, boxes) -> tuple of bytes, one a box, or None\n\n"
             "As decode(), of a baseline file; boxes: tuple of (left, top, right, bottom). None: ask decode().");

static PyObject *work_on(PyObject *args, int pieces) {
    Py_buffer data;
    Py_ssize_t scan;
    PyObject *parts, *made = NULL;
    Piece room[MAX_PIECES];
    Job job;
    memset(&job, 0, sizeof job);
    memset(room, 0, sizeof room);
    job.pieces = room;
    if (jpeg.read == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "no library is in use");
        return NULL;
    }
    int parsed = pieces ? PyArg_ParseTuple(args, "y*nIIO!", &data, &scan, &job.width, &job.height, &PyTuple_Type, &parts)
                        : PyArg_ParseTuple(args, "y*nIIIIO!", &data, &scan, &job.width, &job.height, &job.left, &job.right,
                                           &PyTuple_Type, &parts);
    if (!parsed) return NULL;
    if (!pieces && (job.right > job.width || job.left >= job.right))
        PyErr_SetString(PyExc_ValueError, "region outside of the picture");
    else if (check(&job, &data, scan) && (pieces ? parse_boxes(parts, &job) : parse_bands(parts, &job)))
        made = answer(&job, pieces);
    PyBuffer_Release(&data);
    return made;
}

static PyObject *decode(PyObject *self, PyObject *args) {
    (void)self;
    return work_on(args, 0);
}

static PyObject *cut(PyObject *self, PyObject *args) {
    (void)self;
    return work_on(args, 1);
}

PyDoc_STRVAR(use_doc,
             "use(path) -> None\n\n"
             "Open a libjpeg-turbo for decode(), for good. Raises OSError where it is none.");

static PyObject *use(PyObject *self, PyObject *args) {
    (void)self;
    const char *path;
    if (!PyArg_ParseTuple(args, "s", &path)) return NULL;
    static const char *const names[] = {"jpeg_std_error",         "jpeg_CreateDecompress",   "jpeg_destroy_decompress",
                                        "jpeg_mem_src",           "jpeg_read_header",        "jpeg_start_decompress",
                                        "jpeg_has_multiple_scans", "jpeg_crop_scanline",     "jpeg_skip_scanlines",
                                        "jpeg_read_scanlines"};
    void *found[sizeof names / sizeof *names], *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) return PyErr_Format(PyExc_OSError, "%s", dlerror());
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if ((found[i] = dlsym(library, names[i])) == NULL) {
            PyErr_Format(PyExc_OSError, "%s: no %s", path, names[i]);
            dlclose(library);
            return NULL;
        }
    _Static_assert(sizeof found == sizeof jpeg, "one name a function");
    memcpy(&jpeg, found, sizeof jpeg);
    return Py_NewRef(Py_None);
}

static PyMethodDef methods[] = {
    {"decode", decode, METH_VARARGS, decode_doc}, {"cut", cut, METH_VARARGS, cut_doc}, {"use", use, METH_VARARGS, use_doc}, {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_jpeg_region", "Regions of a JPEG by libjpeg-turbo.", -1, methods,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__jpeg_region(void) { return PyModule_Create(&module); }
