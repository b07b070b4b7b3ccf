/* libjpeg's binary interface of version 62, as far as it is used here: libjpeg-turbo's, in Pillow's wheels and in Linux distributions.

   Declared here and not taken from jpeglib.h, so that nobody needs libjpeg's development files: the library is opened at run time, and
   it is not the one those would belong to either. Names are the interface's; what nobody here reads is room of the right size.
   jpeg_CreateDecompress refuses another version or size, engine/jpeg_region.py compares pixels before the first use, and
   tests/engine/test_jpeg_abi.py holds every offset against jpeglib.h where there is one. */

#ifndef JPEG_ABI_H
#define JPEG_ABI_H

#include <stddef.h>
#include <stdint.h>

enum { JPEG_LIB_VERSION = 62, JPEG_HEADER_OK = 1, JPEG_MAX_DIMENSION = 65500, DCTSIZE = 8, DCTSIZE2 = 64, TRUE = 1 };
enum { NUM_QUANT_TBLS = 4, NUM_HUFF_TBLS = 4, MAX_COMPS_IN_SCAN = 4, D_MAX_BLOCKS_IN_MCU = 10, NUM_ARITH_TBLS = 16 };

typedef enum { JCS_UNKNOWN, JCS_GRAYSCALE, JCS_RGB, JCS_YCbCr } J_COLOR_SPACE;
typedef enum { JDCT_ISLOW } J_DCT_METHOD;

typedef int boolean;
typedef unsigned int JDIMENSION;
typedef unsigned char *JSAMPROW;
typedef JSAMPROW *JSAMPARRAY;

typedef struct jpeg_common_struct *j_common_ptr;
typedef struct jpeg_decompress_struct *j_decompress_ptr;

struct jpeg_error_mgr {
    void (*error_exit)(j_common_ptr);
    void (*emit_message)(j_common_ptr, int level);
    void (*output_message)(j_common_ptr);
    void (*functions[2])(void);
    int msg_code;
    union {
        int i[8];
        char s[80];
    } msg_parm;
    int trace_level;
    long num_warnings;
    const char *const *jpeg_message_table;
    int last_jpeg_message;
    const char *const *addon_message_table;
    int addon_range[2];
};

struct jpeg_source_mgr {
    const unsigned char *next_input_byte;
    size_t bytes_in_buffer;
    void (*functions[5])(void);
};

typedef struct {
    uint16_t quantval[DCTSIZE2];
    boolean sent_table;
} JQUANT_TBL;

typedef struct {
    uint8_t bits[17];
    uint8_t huffval[256];
    boolean sent_table;
} JHUFF_TBL;

typedef struct {
    int component_id, component_index;
    int h_samp_factor, v_samp_factor;
    int quant_tbl_no, dc_tbl_no, ac_tbl_no;
    int sizes_and_state[12];
    JQUANT_TBL *quant_table;
    void *dct_table;
} jpeg_component_info;

/* What every codec object begins with. */
struct jpeg_common_struct {
    struct jpeg_error_mgr *err;
    void *managers[3];
    int state[2];
};

struct jpeg_decompress_struct {
    struct jpeg_error_mgr *err;
    void *managers[3];
    int state[2];
    struct jpeg_source_mgr *src;
    JDIMENSION image_width, image_height;
    int num_components;
    J_COLOR_SPACE jpeg_color_space;
    J_COLOR_SPACE out_color_space;
    unsigned int scale[2];
    double output_gamma;
    int output_modes[2];
    J_DCT_METHOD dct_method;
    int quality_and_colours[9];
    JDIMENSION output_width, output_height;
    int output_shape[4];
    void *colormap;
    JDIMENSION output_scanline;
    int progress[4];
    int (*coef_bits)[DCTSIZE2];
    JQUANT_TBL *quant_tbl_ptrs[NUM_QUANT_TBLS];
    JHUFF_TBL *dc_huff_tbl_ptrs[NUM_HUFF_TBLS];
    JHUFF_TBL *ac_huff_tbl_ptrs[NUM_HUFF_TBLS];
    int data_precision;
    jpeg_component_info *comp_info;
    boolean progressive_mode;
    boolean arith_code;
    uint8_t arithmetic[3][NUM_ARITH_TBLS];
    unsigned int restart_interval;
    boolean saw_JFIF_marker;
    uint8_t version_and_unit[3];
    uint16_t density[2];
    boolean saw_Adobe_marker;
    uint8_t Adobe_transform;
    boolean CCIR601_sampling;
    void *marker_list;
    int max_h_samp_factor, max_v_samp_factor;
    int min_DCT_scaled_size;
    JDIMENSION total_iMCU_rows;
    void *sample_range_limit;
    int comps_in_scan;
    jpeg_component_info *cur_comp_info[MAX_COMPS_IN_SCAN];
    JDIMENSION scan_mcus[2];
    int blocks_in_MCU;
    int MCU_membership[D_MAX_BLOCKS_IN_MCU];
    int Ss, Se, Ah, Al;
    int unread_marker;
    void *modules[11];
};

#endif
