/* Lossless crops of a baseline JPEG; see _jpeg_crop.c. */

#ifndef JPEG_CROP_H
#define JPEG_CROP_H

#include <stddef.h>
#include <stdio.h>

#include "_jpeg_abi.h"

#define MAX_PIECES 8

/* A rectangle of a picture, and a JPEG of it and a little more. */
typedef struct {
    unsigned int left, top, right, bottom; /* in: the pixels that are wanted */
    unsigned char *file;                   /* out: malloc'ed; free() it, after a failure too */
    size_t size, scan;             /* scan: offset of its first entropy-coded byte */
    unsigned int at_left, at_top, width, height; /* out: what the file shows of the picture */
} Piece;

/* Write a file for each piece; 0 where this is not to be done. info: the header, read; scan: its first entropy-coded byte;
   end: one past an end-of-image marker that all restart markers precede in order. */
int crop_jpeg(const struct jpeg_decompress_struct *info, const unsigned char *scan, const unsigned char *end, Piece *pieces,
              int count);

#endif
