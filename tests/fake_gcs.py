"""A stand-in for Google Cloud Storage: the part of its JSON API that gcsfs, google-cloud-storage and TensorStore use.

Objects are kept in memory, each written whole under a new generation. Reads take ranges, and every request may ask
for a generation. A bucket named in `denied` answers 403. A request whose address holds the text `hold` sets `held` and
waits for `release`: so a writer can be killed in the middle.
"""
import base64
import contextlib
import hashlib
import http.server
import importlib.util
import json
import os
import re
import threading
import urllib.parse

# Else gcsfs asks by gRPC, which is not spoken here, what kind of bucket it has. Read when gcsfs is imported.
os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
MISSING, FORBIDDEN, PRECONDITION = (404, 'Not Found'), (403, 'Forbidden'), (412, 'Precondition Failed')


class Refused(Exception):
  """Ends a request with a status and a reason."""


class FakeGcs:
  """A server on a free port; `objects` is {bucket: {name: (content, generation)}}."""

  def __init__(self, *buckets, denied=()):
    self.objects, self.denied = {bucket: {} for bucket in buckets}, set(denied)
    self.generation, self.sessions, self.lock, self.requests = 1000, {}, threading.RLock(), []
    self.hold, self.held, self.release = '', threading.Event(), threading.Event()

  def __enter__(self):
    handler = type('Handler', (Handler,), {'store': self})
    self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    self.server.daemon_threads = True
    self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
    self.thread.start()
    self.url = f'http://127.0.0.1:{self.server.server_port}'
    return self

  def __exit__(self, *_):
    self.server.shutdown()
    self.server.server_close()

  @property
  def environment(self):
    """What makes clients use this server and no account."""
    return {'STORAGE_EMULATOR_HOST': self.url, 'TENSORSTORE_GCS_HTTP_URL': self.url, 'GOOGLE_CLOUD_PROJECT': 'fake',
            'GCE_METADATA_ROOT': '127.0.0.1:1', 'NO_GCE_CHECK': 'true'}

  def put(self, bucket, name, content):
    """Writes an object; returns what describes it."""
    with self.lock:
      self.generation += 1
      self.objects[bucket][name] = (content, self.generation)
      return self.about(bucket, name)

  def upload(self, bucket, folder, root):
    """Writes every file below `root` under gs://bucket/folder."""
    for path in sorted(p for p in root.rglob('*') if p.is_file()):
      self.put(bucket, f'{folder}/{path.relative_to(root).as_posix()}', path.read_bytes())

  def names(self, bucket, prefix=''):
    """The names of the objects under a prefix."""
    with self.lock:
      return sorted(name for name in self.objects[bucket] if name.startswith(prefix))

  def about(self, bucket, name):
    """The resource that describes an object."""
    content, generation = self.objects[bucket][name]
    path = f'{urllib.parse.quote(bucket)}/o/{urllib.parse.quote(name, safe="")}'
    return {'kind': 'storage#object', 'id': f'{bucket}/{name}/{generation}', 'bucket': bucket, 'name': name,
            'size': str(len(content)), 'generation': str(generation), 'metageneration': '1',
            'timeCreated': '2026-01-01T00:00:00.000Z', 'updated': '2026-01-01T00:00:00.000Z',
            'md5Hash': base64.b64encode(hashlib.md5(content).digest()).decode(), 'etag': str(generation),
            'storageClass': 'STANDARD', 'contentType': 'application/octet-stream',
            'mediaLink': f'{self.url}/download/storage/v1/b/{path}?generation={generation}&alt=media'}


class Handler(http.server.BaseHTTPRequestHandler):
  """One connection."""
  protocol_version = 'HTTP/1.1'
  disable_nagle_algorithm = True

  def log_message(self, *_):
    """Says nothing."""

  def handle(self):
    with contextlib.suppress(ConnectionError):  # a client that was killed
      super().handle()

  def answer(self, status, content=b'', **headers):
    """Sends a reply; what is no bytes goes as JSON."""
    content = b'' if status in (204, 304) else content  # these have no body
    if not isinstance(content, bytes):
      content = json.dumps(content).encode()
      headers['Content-Type'] = 'application/json'
    self.send_response(status)
    for key, value in {**headers, 'Content-Length': len(content)}.items():
      self.send_header(key.replace('_', '-'), str(value))
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(content)

  def do(self):
    """Any request."""
    body = self.read_body()
    if self.store.hold and self.store.hold in urllib.parse.unquote(self.path):
      self.store.held.set()
      self.store.release.wait(120)
    try:
      status, content, *more = self.reply(self.command, self.path, self.headers, body)
      self.answer(status, content, **dict(*more))
    except Refused as refused:
      status, reason = refused.args[0]
      self.answer(status, {'error': {'code': status, 'message': reason, 'errors': [{'message': reason}]}})
  do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = do

  def read_body(self):
    """The content of the request, however it is sent."""
    if self.headers.get('Transfer-Encoding', '').lower() != 'chunked':
      return self.rfile.read(int(self.headers.get('Content-Length') or 0))
    parts = []
    while size := int(self.rfile.readline().split(b';')[0], 16):
      parts.append(self.rfile.read(size))
      self.rfile.readline()
    self.rfile.readline()
    return b''.join(parts)

  def reply(self, method, target, headers, body):
    """(status, content, headers) of one request."""
    url = urllib.parse.urlsplit(target)
    query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
    path = re.sub(r'^/+', '/', url.path)
    with self.store.lock:
      self.store.requests.append((method, path, query))
      if path.startswith('/batch/'):
        return self.batch(headers, body)
      match = re.match(r'^(?:/download|/upload)?(?:/resumable)?(?:/storage/v1)?/b/([^/]+)(/o(?:/(.*))?|/.*)?$', path)
      if not match:
        raise Refused(MISSING)
      bucket, rest, name = urllib.parse.unquote(match[1]), match[2] or '', match[3]
      if bucket in self.store.denied:
        raise Refused(FORBIDDEN)
      if bucket not in self.store.objects:
        raise Refused((404, 'The specified bucket does not exist.'))
      if path.startswith('/upload/'):
        return self.receive(bucket, query, headers, body)
      if not rest:
        return 200, {'kind': 'storage#bucket', 'id': bucket, 'name': bucket, 'storageClass': 'STANDARD',
                     'location': 'US', 'locationType': 'multi-region', 'iamConfiguration': {}}
      if rest == '/storageLayout':
        return 200, {'kind': 'storage#storageLayout', 'bucket': bucket, 'location': 'US',
                     'locationType': 'multi-region', 'hierarchicalNamespace': {'enabled': False}}
      if name is None and method == 'GET':
        return self.listed(bucket, query)
      if name and method == 'POST' and (found := re.match(r'(.*)/(?:copyTo|rewriteTo)/b/([^/]+)/o/(.*)', name)):
        return self.copied(bucket, *map(urllib.parse.unquote, found.groups()))
      if name and method == 'POST' and (found := re.match(r'(.*)/moveTo/o/(.*)', name)):
        source, moved = map(urllib.parse.unquote, found.groups())
        answer = self.copied(bucket, source, bucket, moved)
        del self.store.objects[bucket][source]
        return answer
      return self.one(method, bucket, urllib.parse.unquote(name or ''), query, headers)

  def one(self, method, bucket, name, query, headers):
    """Reads, describes or removes an object."""
    objects = self.store.objects[bucket]
    self.check(bucket, name, query)
    if name not in objects:
      raise Refused((404, f'No such object: {bucket}/{name}'))
    content, generation = objects[name]
    if method == 'DELETE':
      del objects[name]
      return 204, b''
    if query.get('alt') != 'media' and not self.path.startswith('/download/'):
      return 200, self.store.about(bucket, name)
    about = {'x_goog_generation': generation, 'x_goog_metageneration': 1, 'ETag': generation,
             'x_goog_storage_class': 'STANDARD', 'Content_Type': 'application/octet-stream'}
    span = re.fullmatch(r'bytes=(\d*)-(\d*)', headers.get('Range') or '')
    if not span:
      return 200, content, about
    size = len(content)
    start = int(span[1]) if span[1] else max(size - int(span[2]), 0)
    stop = min(int(span[2]) + 1, size) if span[1] and span[2] else size
    if start >= size:
      return 416, b'', {**about, 'Content_Range': f'bytes */{size}'}
    return 206, content[start:stop], {**about, 'Content_Range': f'bytes {start}-{stop - 1}/{size}'}

  def check(self, bucket, name, query):
    """Refuses a request whose generation is not the one there; 0 stands for no object."""
    there = self.store.objects[bucket].get(name, (b'', 0))[1]
    if 'ifGenerationMatch' in query and int(query['ifGenerationMatch']) != there:
      raise Refused(PRECONDITION)
    if 'ifGenerationNotMatch' in query and int(query['ifGenerationNotMatch']) == there:
      raise Refused((304, 'Not Modified'))

  def listed(self, bucket, query):
    """The objects under a prefix, and the folders if there is a delimiter."""
    prefix, delimiter = query.get('prefix', ''), query.get('delimiter')
    items, prefixes = [], set()
    for name in self.store.names(bucket, prefix):
      if name < query.get('startOffset', '') or ('endOffset' in query and name >= query['endOffset']):
        continue
      inner = name[len(prefix):]
      if delimiter and delimiter in inner:
        prefixes.add(prefix + inner.partition(delimiter)[0] + delimiter)
      else:
        items.append(self.store.about(bucket, name))
    return 200, {'kind': 'storage#objects', **({'items': items} if items else {}),
                 **({'prefixes': sorted(prefixes)} if prefixes else {})}

  def receive(self, bucket, query, headers, body):
    """Takes an upload: at once, with a description before it, or piece by piece."""
    kind, name = query.get('uploadType'), query.get('name')
    if 'upload_id' in query:
      return self.continued(query['upload_id'], headers, body)
    if kind == 'multipart':
      boundary = re.search(r'boundary="?([^";]+)"?', headers['Content-Type'])[1].encode()
      about, content = (part.split(b'\r\n\r\n', 1)[-1] if b'\r\n\r\n' in part else part.split(b'\n\n', 1)[-1]
                        for part in body.split(b'--' + boundary)[1:3])
      name, body = json.loads(about)['name'], content.removesuffix(b'\n').removesuffix(b'\r')
    elif kind == 'resumable':
      name = name or json.loads(body or b'{}')['name']
      session = str(len(self.store.sessions))
      self.store.sessions[session] = (bucket, name, query, bytearray())
      return 200, b'', {'Location': f'{self.store.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable'
                                     f'&upload_id={session}'}
    self.check(bucket, name, query)
    return 200, self.store.put(bucket, name, body)

  def continued(self, session, headers, body):
    """The next piece of an upload; the object exists after the last."""
    bucket, name, query, data = self.store.sessions[session]
    data += body
    total = re.fullmatch(r'bytes (?:[\d-]+|\*)/(\d+|\*)', headers.get('Content-Range') or f'bytes */{len(data)}')[1]
    if total == '*' or len(data) < int(total):
      return 308, b'', {'Range': f'bytes=0-{len(data) - 1}'} if data else {}
    self.check(bucket, name, query)
    return 200, self.store.put(bucket, name, bytes(data))

  def copied(self, bucket, name, other, target):
    """Copies an object."""
    if name not in self.store.objects[bucket]:
      raise Refused(MISSING)
    about = self.store.put(other, target, self.store.objects[bucket][name][0])
    size = about['size']
    return 200, {'kind': 'storage#rewriteResponse', 'done': True, 'resource': about, 'objectSize': size,
                 'totalBytesRewritten': size, **about}

  def batch(self, headers, body):
    """Several requests in one, as multipart/mixed."""
    boundary = re.search(r'boundary="?([^";]+)"?', headers['Content-Type'])[1]
    answers = []
    for part in body.decode().split(f'--{boundary}')[1:-1]:
      method, target = re.search(r'(GET|POST|DELETE|PATCH) (\S+)', part).groups()
      number = re.search(r'Content-ID: <([^>]*)>', part, re.IGNORECASE)
      try:
        status, content = self.reply(method, re.sub(r'^https?://[^/]+', '', target), {}, b'')[:2]
      except Refused as refused:
        status, content = refused.args[0][0], {'error': {'code': refused.args[0][0], 'message': refused.args[0][1]}}
      text = content.decode() if isinstance(content, bytes) else json.dumps(content)
      answers.append(f'--{boundary}\r\nContent-Type: application/http\r\n'
                     f'Content-ID: <response-{number[1] if number else ""}>\r\n\r\n'
                     f'HTTP/1.1 {status} X\r\nContent-Length: {len(text)}\r\n\r\n{text}\r\n')
    content = (''.join(answers) + f'--{boundary}--\r\n').encode()
    return 200, content, {'Content_Type': f'multipart/mixed; boundary={boundary}'}


def installed():
  """Whether buckets can be read here."""
  return importlib.util.find_spec('gcsfs') is not None


@contextlib.contextmanager
def serving(monkeypatch, *buckets, denied=()):
  """A server that this process and those it starts will use."""
  with FakeGcs(*buckets, denied=denied) as store:
    for key, value in store.environment.items():
      monkeypatch.setenv(key, value)
    forget()
    yield store
  forget()


def forget():
  """Drops the file systems that a process keeps, which know the address of their server."""
  with contextlib.suppress(ImportError):
    import gcsfs
    gcsfs.GCSFileSystem.clear_instance_cache()
  from etils.epath import backend
  backend.fsspec_backend._get_filesystem.cache_clear()
